"""Questions of reasoning_gym as a dataset: splits that share nothing, seeds, and messages for people."""

from __future__ import annotations

import pytest

from rlhf_ray.config.schema import DatasetSection, ReasoningGymReward
from rlhf_ray.data.formats import check_columns, prompt_examples
from rlhf_ray.data.loading import load_rows
from rlhf_ray.errors import DataError
from rlhf_ray.rewards.verifiers import text_verifier

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
"""Sums of two digits: 200 questions at most."""


def section(task: str = "chain_sum", **options: object) -> DatasetSection:
    return DatasetSection.model_validate({"path": f"reasoning_gym:{task}", **options})


def questions(section: DatasetSection, seed: int = 0) -> list[str]:
    return [str(row["prompt"]) for row in load_rows(section, seed).rows]


def test_as_many_different_questions_as_asked_for() -> None:
    found = questions(section(limit=300))
    assert len(set(found)) == len(found) == 300
    assert len(questions(section())) == 1000


def test_test_shares_no_question_with_train_whatever_seeds_and_limits() -> None:
    """Two hundred questions, of which seeds alone would give both splits nearly all."""
    train = {q for seed in (0, 1) for q in questions(section(options=SMALL, limit=150), seed)}
    test = {q for seed in (0, 7) for q in questions(section(options=SMALL, limit=40, split="test"), seed)}
    assert not train & test
    assert len(train) > 100
    assert len(test) > 25


def test_a_task_may_have_fewer_questions() -> None:
    found = questions(section(options=SMALL, limit=1000))
    assert 100 < len(found) < 200


def test_equal_seeds_give_equal_questions() -> None:
    assert questions(section(limit=20), 3) == questions(section(limit=20), 3)
    assert questions(section(limit=20), 3) != questions(section(limit=20), 4)


def test_the_scorer_reads_what_the_dataset_wrote() -> None:
    suffix = "\nGive the number alone."
    table = load_rows(section(limit=5, options=SMALL, prompt_suffix=suffix), seed=0)
    examples, _ = prompt_examples(table)
    assert all(example.messages[0]["content"].endswith("=" + suffix) for example in examples)
    columns = {name: [e.columns[name] for e in examples] for name in ("entry", "task_options", "answer")}
    score = text_verifier(ReasoningGymReward(type="reasoning_gym"))
    right = [str(answer) for answer in columns["answer"]]
    wrong = [f"{int(answer) + 1}" for answer in right]
    assert score([], right, **columns) == [1.0] * 5
    assert score([], wrong, **columns) == [0.0] * 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            section("chain_sun"),
            "dataset.path=reasoning_gym:chain_sun: reasoning_gym has no such task; "
            "did you mean reasoning_gym:chain_sum?",
        ),
        (
            section(options={"min_term": 2}),
            "dataset.options={'min_term': 2}: chain_sum has no option min_term; did you mean min_terms?",
        ),
        (
            section(options={"min_terms": 4, "max_terms": 3}),
            "dataset.options={'min_terms': 4, 'max_terms': 3}: chain_sum refuses them: "
            "max_terms must be >= min_terms",
        ),
        (
            section("decimal_arithmetic", options={"max_num_decimal_places": 2}),
            "dataset.options={'max_num_decimal_places': 2}: reasoning_gym:decimal_arithmetic fails with "
            "them: empty range for randrange() (3, 3, 0); change them",
        ),
        (
            section(split="validation"),
            "dataset.split=validation: reasoning_gym:chain_sum has the splits train and test; "
            "use one of them",
        ),
        (
            DatasetSection(path="rows.jsonl", options={"a": 1}),
            "dataset.options={'a': 1}: belongs to datasets of reasoning_gym:TASK; remove options",
        ),
    ],
)
def test_mistakes(given: DatasetSection, message: str) -> None:
    with pytest.raises(DataError) as raised:
        load_rows(given, seed=0)
    assert str(raised.value) == message
    assert check_columns(given, "prompts") == [message]
