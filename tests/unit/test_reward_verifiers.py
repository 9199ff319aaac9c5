"""Rewards computed from text, each against cases that are worked out by hand."""

from __future__ import annotations

import asyncio

import pytest

from rlhf_ray.config.schema import (
    ExactMatchReward,
    FormatReward,
    LengthReward,
    MathReward,
    ReasoningGymReward,
    RegexReward,
    TextVerifier,
)
from rlhf_ray.data.reasoning_gym import make_task
from rlhf_ray.rewards.source import Samples
from rlhf_ray.rewards.verifiers import LengthSource, answer_in, text_verifier
from tests.samples import rollouts_of


def rewards(section: TextVerifier, *texts: str, **columns: list[object]) -> list[float | None]:
    return text_verifier(section)([[]] * len(texts), list(texts), **columns)  # type: ignore[return-value]


TAG = "<answer>(.*?)</answer>"


def test_the_last_match_is_the_answer() -> None:
    assert answer_in("<answer>1</answer> no: <answer> 2 </answer>", TAG) == "2"
    assert answer_in("2", TAG) is None
    assert answer_in(" 2\n", None) == "2"


def test_exact_match() -> None:
    section = ExactMatchReward(type="exact_match")
    found = rewards(
        section, " Paris\n", "paris", "Paris.", "7", "x", answer=["Paris", "Paris ", "Paris", 7, None]
    )
    assert found == [1.0, 0.0, 0.0, 1.0, None]
    loose = ExactMatchReward(type="exact_match", column="gold", ignore_case=True, extract=TAG)
    texts = ["so <answer>PARIS</answer>", "Paris", "<answer>Rome</answer>"]
    assert rewards(loose, *texts, gold=["paris"] * 3) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "right", "reward"),
    [
        ("0.5", "1/2", 1.0),
        (r"$\frac{1}{2}$", "0.5", 1.0),
        (r"So it is \boxed{\frac{2}{4}}.", "1/2", 1.0),
        ("The answer is 12.", "12", 1.0),
        ("1,234", "1234", 1.0),
        (r"$(x+1)^2$", r"$x^2 + 2x + 1$", 1.0),
        (r"$\sqrt{8}$", r"2\sqrt{2}", 1.0),
        ("0.51", "1/2", 0.0),
        (r"$2$", r"2\sqrt{2}", 0.0),
        ("no idea", "12", 0.0),
        ("", "12", 0.0),
        ("12", "no mathematics here", None),
    ],
)
def test_math(answer: str, right: str, reward: float | None) -> None:
    assert rewards(MathReward(type="math"), answer, answer=[right]) == [reward]


def test_math_takes_the_extracted_answer() -> None:
    section = MathReward(type="math", extract=r"#### *(.+)")
    assert rewards(section, "3 or 4\n#### 0.25", "0.25", answer=["1/4"] * 2) == [1.0, 0.0]


def test_regex() -> None:
    section = RegexReward(type="regex", pattern=r"\bbecause\b")
    assert rewards(section, "I know because I saw", "becauses") == [1.0, 0.0]
    by_row = RegexReward(type="regex", column="wanted")
    assert rewards(by_row, "an egg", "an egg", "x", wanted=["egg$", "^egg", None]) == [1.0, 0.0, None]


def test_format_matches_the_whole_completion_over_lines() -> None:
    section = FormatReward(type="format", pattern="<think>.*</think>.+")
    texts = ["<think>a\nb</think> 4", "so <think>a</think> 4", "<think>a</think>"]
    assert rewards(section, *texts) == [1.0, 0.0, 0.0]


def lengths(section: LengthReward, *counts: int) -> list[float]:
    rollouts = rollouts_of([[1]] * len(counts), [[5] * count for count in counts])
    samples = Samples(("",) * len(counts), rollouts)
    return asyncio.run(LengthSource(section).score(samples)).rewards.tolist()


def test_length_beyond_a_limit() -> None:
    """0 up to 8 tokens, then -1/4 a token."""
    section = LengthReward(type="length", max_tokens=8, buffer=4)
    assert lengths(section, 1, 8, 9, 11, 12, 40) == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]
    assert lengths(LengthReward(type="length", max_tokens=8), 12) == [-0.5]


def test_length_near_a_target() -> None:
    assert lengths(LengthReward(type="length", target=8), 8, 6, 10, 40) == [0.0, -0.25, -0.25, -1.0]


def test_reasoning_gym_scores_by_the_tasks_own_scorer() -> None:
    entry = make_task("chain_sum", {"min_terms": 2, "max_terms": 2})[0]
    right = str(entry["answer"])
    columns: dict[str, list[object]] = {
        "entry": [entry] * 4 + [None],
        "task_options": [{"min_terms": 2, "max_terms": 2}] * 5,
    }
    texts = [right, f" {right}\n", f"{int(right) + 1}", f"it is {right}", right]
    strict = ReasoningGymReward(type="reasoning_gym")
    assert rewards(strict, *texts, **columns) == [1.0, 1.0, 0.0, 0.0, None]
    partial = ReasoningGymReward(type="reasoning_gym", threshold=None)
    # The scorer of chain_sum gives an answer among other text the share of it that is the answer.
    share = len(right) / len(f"it is {right}")
    assert rewards(partial, *texts, **columns) == [1.0, 1.0, 0.0, pytest.approx(share), None]
    tagged = ReasoningGymReward(type="reasoning_gym", extract=TAG)
    found = rewards(tagged, f"<answer>{right}</answer>", right, **{k: v[:2] for k, v in columns.items()})
    assert found == [1.0, 0.0]


def test_a_scorer_knows_the_options_of_its_task() -> None:
    """decimal_arithmetic compares as many places as its options say: a thousandth, or a millionth."""
    section = ReasoningGymReward(type="reasoning_gym", threshold=1.0)
    for places, reward in ((3, 1.0), (6, 0.0)):
        options = {"min_num_decimal_places": 3, "max_num_decimal_places": places}
        entry = {**make_task("decimal_arithmetic", options)[0], "answer": "2.500000"}
        found = rewards(section, "2.500004", entry=[entry], task_options=[options])
        assert found == [reward], places


def test_an_answer_that_a_scorer_cannot_read_is_wrong() -> None:
    """prime_factorization's scorer raises ValueError on words."""
    entry = make_task("prime_factorization", {})[0]
    with pytest.raises(ValueError):
        make_task("prime_factorization", {}).score_answer("two times three", entry)
    section = ReasoningGymReward(type="reasoning_gym", threshold=None)
    texts = ["two times three", str(entry["answer"])]
    assert rewards(section, *texts, entry=[entry] * 2, task_options=[{}, {}]) == [0.0, 1.0]
