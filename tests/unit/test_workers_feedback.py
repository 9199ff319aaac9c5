"""AI feedback: what an engine's log-probs become, and that the place of an answer does not count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.config.schema import ConstitutionAnnotator
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.constitution import (
    ANSWER_LEAD,
    OPTIONS,
    Constitution,
    choice_messages,
    load_constitution,
)
from rlhf_ray.roles import Done, Pending
from rlhf_ray.types import JudgedPair, Judgement, Ragged
from rlhf_ray.workers.feedback import FeedbackAnnotator, feedback_metrics, longest_question
from tests.fakes import HandFedGenerator
from tests.local_roles import LocalFeedbackEngine
from tests.samples import prompts_of
from tests.tiny import tiny_model_folder, tiny_tokenizer

SHORT = """\
principles:
  - {id: kind, critique: a, revision: b, choice: "Kinder?", source: s}
  - {id: "true", critique: a, revision: b, choice: "Truer?", source: s}
  - {id: short, critique: a, revision: b, choice: "Shorter?", source: s}
"""
USER = ({"role": "user", "content": "Hm?"},)


@dataclass
class Opinionated:
    """A feedback model: P(option) of a question is what `opinion` says of its text and the option.

    Fields: rows: the texts that it was asked about.
    """

    opinion: Callable[[str, str], float]
    rows: list[str] = field(default_factory=list)

    def token_logprobs(self, sequences: Ragged) -> Sequence[Pending[Ragged]]:
        tokenizer = tiny_tokenizer()
        length = len(tokenizer(OPTIONS[0])["input_ids"])
        values = []
        for row in sequences:
            text = tokenizer.decode(row[:-length], skip_special_tokens=True)
            option = tokenizer.decode(row[-length:])
            self.rows.append(text)
            # What stands before the option must not count.
            logprobs = np.full(len(row) - 1, -7.0)
            logprobs[-length:] = math.log(self.opinion(text, option)) / length
            values.append(logprobs)
        return [Done(Ragged.from_rows(values, np.float32))]


@pytest.fixture(scope="module")
def constitution(tmp_path_factory: pytest.TempPathFactory) -> Constitution:
    path = tmp_path_factory.mktemp("constitution") / "short.yaml"
    path.write_text(SHORT)
    return load_constitution(str(path))


def formatter() -> ChatFormatter:
    return ChatFormatter(tiny_tokenizer(), (2,))


def annotator(
    constitution: Constitution, engine: Opinionated, max_model_len: int = 1000, seed: int = 0, **keys: object
) -> FeedbackAnnotator:
    section = ConstitutionAnnotator.model_validate({"type": "constitution", "name": "ai", **keys})
    return FeedbackAnnotator(section, constitution, formatter(), engine, max_model_len, seed)


def pair(first: str, second: str, prompt_id: int = 0, **votes: int) -> JudgedPair:
    return JudgedPair(prompt_id, USER, (first, second), dict(votes), {})


def shown_first(text: str, answer: str) -> bool:
    return f"(A) {answer}" in text


def test_both_orders_by_hand(constitution: Constitution) -> None:
    """Options have 0.3 and 0.1 in the given order, so P(second) = 1/4; in the other, 0.2 and 0.3: 2/5."""

    def opinion(text: str, option: str) -> float:
        straight = shown_first(text, "one")
        return {(True, " (A)"): 0.3, (True, " (B)"): 0.1, (False, " (A)"): 0.2, (False, " (B)"): 0.3}[
            straight, option
        ]

    (judged,) = annotator(constitution, Opinionated(opinion)).judge([pair("one", "two")])
    (said,) = judged.judgements
    assert (said.straight, said.swapped) == (pytest.approx(0.25), pytest.approx(0.4))
    assert judged.probabilities == {"ai": pytest.approx((0.25 + 0.4) / 2)}
    assert judged.votes == {"ai": 0}
    assert judged.preferred == 0
    assert judged.lead == pytest.approx(2 * 0.325 - 1)
    assert feedback_metrics([judged]) == {
        "preferences/order_disagreement": 0.0,
        "preferences/certainty": pytest.approx(0.175),
        "preferences/unjudged": 0.0,
        f"preferences/principle/{said.principle}": 1.0,
    }


@pytest.mark.parametrize("for_a", [0.9, 0.5, 1 / 3, 1e-6, *np.linspace(0.05, 0.45, 9)])
def test_a_model_that_looks_at_the_place_alone_has_no_opinion(
    constitution: Constitution, for_a: float
) -> None:
    engine = Opinionated(lambda text, option: for_a if option == " (A)" else 1 - for_a)
    (judged,) = annotator(constitution, engine).judge([pair("one", "two")])
    assert judged.probabilities == {"ai": 0.5}
    assert judged.votes == {}
    assert judged.preferred is None
    assert feedback_metrics([judged])["preferences/order_disagreement"] == float(for_a != 0.5)
    assert feedback_metrics([judged])["preferences/certainty"] == 0.0


@pytest.mark.parametrize("answers", [("good", "bad"), ("bad", "good")])
def test_a_fair_model_finds_the_winner(constitution: Constitution, answers: tuple[str, str]) -> None:
    def opinion(text: str, option: str) -> float:
        return 0.8 if shown_first(text, "good") == (option == " (A)") else 0.2

    (judged,) = annotator(constitution, Opinionated(opinion)).judge([pair(*answers)])
    assert judged.preferred is not None
    assert judged.answers[judged.preferred] == "good"
    assert judged.probabilities["ai"] == pytest.approx(0.8 if answers[1] == "good" else 0.2)
    assert feedback_metrics([judged])["preferences/order_disagreement"] == 0.0


def test_several_principles_are_averaged(constitution: Constitution) -> None:
    """Each asked once, in both orders: P(second) = 0.9 by kindness, 0.6 by truth, 0.3 by brevity."""
    second_is = {"Kinder?": 0.9, "Truer?": 0.6, "Shorter?": 0.3}

    def opinion(text: str, option: str) -> float:
        probability = next(p for question, p in second_is.items() if question in text)
        return probability if shown_first(text, "one") == (option == " (B)") else 1 - probability

    engine = Opinionated(opinion)
    (judged,) = annotator(constitution, engine, num_principles=3).judge([pair("one", "two")])
    assert judged.probabilities["ai"] == pytest.approx(0.6)
    assert {said.principle: said.probability for said in judged.judgements} == {
        "kind": pytest.approx(0.9),
        "true": pytest.approx(0.6),
        "short": pytest.approx(0.3),
    }
    assert len(engine.rows) == 3 * 2 * 2


@pytest.mark.parametrize(("said", "clamped"), [(0.95, 0.6), (0.05, 0.4), (0.55, 0.55)])
def test_clamping(constitution: Constitution, said: float, clamped: float) -> None:
    def opinion(text: str, option: str) -> float:
        return said if shown_first(text, "one") == (option == " (B)") else 1 - said

    (judged,) = annotator(constitution, Opinionated(opinion), max_probability=0.6).judge([pair("one", "two")])
    assert judged.probabilities["ai"] == pytest.approx(clamped)
    assert judged.judgements[0].probability == pytest.approx(said), "kept as it was said"


def test_principles_are_drawn_by_seed_prompt_and_pair(constitution: Constitution) -> None:
    pairs = [pair("one", "two", prompt) for prompt in range(60) for _ in range(3)]

    def drawn(judged: Sequence[JudgedPair]) -> list[str]:
        return [said.principle for each in judged for said in each.judgements]

    def fair(text: str, option: str) -> float:
        return 0.5

    whole = drawn(annotator(constitution, Opinionated(fair)).judge(pairs))
    half = annotator(constitution, Opinionated(fair))
    assert drawn(half.judge(pairs[90:])) + drawn(half.judge(pairs[:90])) == whole[90:] + whole[:90]
    assert drawn(annotator(constitution, Opinionated(fair), seed=1).judge(pairs)) != whole
    assert sum(len(set(whole[start : start + 3])) > 1 for start in range(0, 180, 3)) > 40, (
        "within a prompt too"
    )
    # 180 draws of three: 60 each, standard deviation 6.3.
    assert all(35 < whole.count(name) < 85 for name in ("kind", "true", "short"))
    several = annotator(constitution, Opinionated(fair), num_principles=2).judge(pairs)
    assert all(len({said.principle for said in each.judgements}) == 2 for each in several)


def test_other_opinions_stay_beside_it(constitution: Constitution) -> None:
    """One vote for the second answer is 1, the model says 0.2: the mean is 0.6."""

    def opinion(text: str, option: str) -> float:
        return 0.2 if shown_first(text, "one") == (option == " (B)") else 0.8

    (judged,) = annotator(constitution, Opinionated(opinion)).judge([pair("one", "two", careful=1)])
    assert judged.votes == {"careful": 1, "ai": 0}
    assert judged.lead == pytest.approx(2 * 0.6 - 1)
    assert judged.preferred == 1


def test_a_question_that_is_too_long_is_not_asked(constitution: Constitution) -> None:
    def fair(text: str, option: str) -> float:
        return 0.5

    needed = longest_question(constitution, formatter(), prompts_of("Hm?"), max_completion_length=3)
    engine = Opinionated(fair)
    judged = annotator(constitution, engine, max_model_len=needed).judge(
        [pair("one", "two"), pair("one " * 400, "two")]
    )
    assert [len(each.judgements) for each in judged] == [1, 0]
    assert judged[1].preferred is None and judged[1].lead == 0.0
    assert all("one one" not in text for text in engine.rows)
    assert feedback_metrics(judged)["preferences/unjudged"] == 1.0
    assert annotator(constitution, engine, max_model_len=20).judge([pair("one", "two")])[0].judgements == ()


def test_nobody_asked_says_nothing() -> None:
    assert feedback_metrics([pair("one", "two", careful=1)]) == {}


def test_disagreement_counts_judgements() -> None:
    said = [
        Judgement("ai", "kind", 0.9, 0.2),
        Judgement("ai", "kind", 0.9, 0.6),
        Judgement("ai", "true", 0.1, 0.4),
        Judgement("ai", "true", 0.5, 0.6),
    ]
    judged = [
        JudgedPair(0, USER, ("x", "y"), {"ai": 1}, {}, {"ai": each.probability}, (each,)) for each in said
    ]
    found = feedback_metrics(judged)
    assert found["preferences/order_disagreement"] == 0.25
    assert found["preferences/certainty"] == pytest.approx((0.05 + 0.25 + 0.25 + 0.05) / 4)
    assert (found["preferences/principle/kind"], found["preferences/principle/true"]) == (2.0, 2.0)


def test_against_transformers_token_by_token(constitution: Constitution, tmp_path: Path) -> None:
    """The real engine and the tiny model, whose log-probs are summed here one token at a time."""
    folder = tiny_model_folder(tmp_path / "tiny")
    engine = LocalFeedbackEngine([HandFedGenerator(folder, version=0)])
    section = ConstitutionAnnotator(type="constitution", name="ai")
    worker = FeedbackAnnotator(section, constitution, formatter(), engine, 200, seed=3)
    (judged,) = worker.judge([pair("an egg", "the train")])
    (said,) = judged.judgements
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = tiny_tokenizer()

    def logprob(answers: tuple[str, str], option: str) -> float:
        messages = list(choice_messages(constitution[said.principle], USER, answers))
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text + ANSWER_LEAD)["input_ids"]
        total = 0.0
        for token in tokenizer(option)["input_ids"]:
            with torch.no_grad():
                total += float(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
            ids = [*ids, token]
        return total

    for answers, second, expected in (
        (("an egg", "the train"), " (B)", said.straight),
        (("the train", "an egg"), " (A)", said.swapped),
    ):
        a, b = (math.exp(logprob(answers, option)) for option in OPTIONS)
        assert expected == pytest.approx((b if second == " (B)" else a) / (a + b), abs=1e-5)
