"""Simulated annotators: how often they vote for what, and on which pairs."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from rlhf_ray.config.schema import ModelSection, SimulatedAnnotator
from rlhf_ray.types import JudgedPair, Rollouts
from rlhf_ray.workers.annotator import AnnotatorWorker, preference_probability
from tests.samples import rollouts_of
from tests.tiny import tiny_model_folder, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


def annotator(name: str = "one", temperature: float = 0.0, error_rate: float = 0.0) -> SimulatedAnnotator:
    """Likes long answers."""
    return SimulatedAnnotator(
        name=name, function="tests.fakes:num_characters", temperature=temperature, error_rate=error_rate
    )


def answers(*texts: list[str]) -> Rollouts:
    """The answers to each prompt; prompt p has the id 100 + p."""
    tokenizer = tiny_tokenizer()
    flat = [[*tokenizer(text)["input_ids"], 2] for group in texts for text in group]
    ids = [100 + prompt for prompt, group in enumerate(texts) for _ in group]
    return rollouts_of([[1, 30]] * len(flat), flat, prompt_ids=ids)


@pytest.mark.parametrize(
    ("gold", "temperature", "error_rate", "expected"),
    [
        ((0.0, 1.0), 0.0, 0.0, 1.0),
        ((1.0, 0.0), 0.0, 0.0, 0.0),
        ((1.0, 1.0), 0.0, 0.0, 0.5),
        ((0.0, 1.0), 0.0, 0.2, 0.9),
        ((0.0, math.log(3)), 1.0, 0.0, 0.75),
        ((0.0, 2 * math.log(3)), 2.0, 0.0, 0.75),
        ((math.log(3), 0.0), 1.0, 0.2, 0.8 * 0.25 + 0.1),
        ((0.0, 1e6), 0.1, 0.0, 1.0),
    ],
)
def test_probability_by_hand(
    gold: tuple[float, float], temperature: float, error_rate: float, expected: float
) -> None:
    assert preference_probability(*gold, temperature, error_rate) == pytest.approx(expected)


@pytest.mark.parametrize(("temperature", "error_rate"), [(2.0, 0.0), (2.0, 0.3), (0.0, 0.3), (0.0, 0.0)])
def test_votes_come_as_often_as_the_formula_says(
    model: ModelSection, temperature: float, error_rate: float
) -> None:
    """Of 1500 comparisons of answers of 1 and 3 characters."""
    worker = AnnotatorWorker([annotator("one", temperature, error_rate)], model, 1, seed=0)
    judged = worker.annotate(answers(*[["a", "aaa"]] * 1500))
    for_longer = [pair.answers[pair.votes["one"]] == "aaa" for pair in judged]
    expected = preference_probability(1.0, 3.0, temperature, error_rate)
    error = math.sqrt(expected * (1 - expected) / 1500)
    assert np.mean(for_longer) == pytest.approx(expected, abs=4 * error + 1e-12)
    first = np.mean([pair.answers[0] == "a" for pair in judged])
    assert first == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 1500)), "the place gives no hint"


def test_annotators_err_independently(model: ModelSection) -> None:
    worker = AnnotatorWorker([annotator("one", 0.0, 0.5), annotator("two", 0.0, 0.5)], model, 1, seed=0)
    judged = worker.annotate(answers(*[["a", "aaa"]] * 1500))
    wrong = np.array([[p.answers[p.votes[n]] == "a" for n in ("one", "two")] for p in judged], dtype=float)
    assert np.corrcoef(wrong.T)[0, 1] == pytest.approx(0.0, abs=4 / math.sqrt(1500))


GROUPS = [["a", "bb", "ccc", "dddd"], ["x", "yy", "zzz"], ["e", "ff"], ["g", "hh", "iii", "j"]]


def test_chunks_and_engines_do_not_matter(model: ModelSection) -> None:
    """Judged at once, prompt by prompt, or in another order of prompts: the same pairs and votes."""
    worker = AnnotatorWorker([annotator("one", 1.0, 0.2), annotator("two", 3.0)], model, 3, seed=5)
    everything = answers(*GROUPS)
    whole = worker.annotate(everything)
    bounds = np.cumsum([0, *map(len, GROUPS)])
    chunks = [everything.select(np.arange(start, end)) for start, end in pairwise(bounds)]
    assert [pair for chunk in chunks for pair in worker.annotate(chunk)] == whole
    backwards = [pair for chunk in reversed(chunks) for pair in worker.annotate(chunk)]
    assert sorted(backwards, key=lambda pair: pair.prompt_id) == whole
    other = AnnotatorWorker([annotator("one", 1.0, 0.2), annotator("two", 3.0)], model, 3, seed=6)
    assert other.annotate(everything) != whole


def test_pairs_are_of_different_answers_each_pair_once(model: ModelSection) -> None:
    texts = ["a", "bb", "a", " bb ", "", "   ", "ccc", "dddd"]
    worker = AnnotatorWorker([annotator()], model, pairs_per_prompt=100, seed=0)
    judged = worker.annotate(answers(texts))
    pairs = {frozenset(answer.strip() for answer in pair.answers) for pair in judged}
    assert len(judged) == 6, "4 different answers have 6 pairs"
    assert pairs == {frozenset(pair) for pair in ["a bb", "a ccc", "a dddd", "bb ccc", "bb dddd", "ccc dddd"]
                     for pair in [pair.split()]}  # fmt: skip
    few = AnnotatorWorker([annotator()], model, pairs_per_prompt=2, seed=0).annotate(answers(texts))
    assert [pair.answers for pair in few] == [pair.answers for pair in judged[:2]]


def test_nothing_to_compare(model: ModelSection) -> None:
    worker = AnnotatorWorker([annotator()], model, 3, seed=0)
    assert worker.annotate(answers(["a", "a "], ["", "b"], [" ", ""])) == []


def test_a_sure_annotator_prefers_the_better_and_says_by_what_it_judged(model: ModelSection) -> None:
    worker = AnnotatorWorker([annotator("sure")], model, 1, seed=0)
    (pair,) = worker.annotate(answers(["aaa", "b"]))
    winner = pair.answers.index("aaa")
    assert (pair.votes, pair.preferred, pair.prompt_id) == ({"sure": winner}, winner, 100)
    assert pair.gold["sure"][winner] == 3.0
    assert pair.gold["sure"][1 - winner] == 1.0
    assert pair.messages == ({"role": "user", "content": "question 100"},)


@pytest.mark.parametrize(
    ("votes", "lead", "preferred"),
    [([0], -1.0, 0), ([1], 1.0, 1), ([0, 1], 0.0, None), ([1, 1, 0], 1 / 3, 1), ([0, 0, 0, 1], -0.5, 0)],
)
def test_majority(votes: list[int], lead: float, preferred: int | None) -> None:
    pair = JudgedPair(0, (), ("a", "b"), {str(number): vote for number, vote in enumerate(votes)}, {})
    assert pair.lead == pytest.approx(lead)
    assert pair.preferred == preferred
