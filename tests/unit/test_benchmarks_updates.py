"""What the benchmarks of training count, and that their arms do the same work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import logprobs, train, train_padded
from benchmarks.paired import Options, Result
from benchmarks.train_padded import fixed_rows, padded_tokens
from benchmarks.updates import LENGTHS, assert_alike, num_tokens, rl_batch, rollouts_of

ROLLOUTS = rollouts_of([(3, 4), (10, 2), (5, 20), (1, 1)], vocabulary=100)
BATCH = rl_batch(ROLLOUTS, ROLLOUTS.logprobs)


def test_padded_tokens_by_hand() -> None:
    """30 tokens a row at the longest, so two rows fit into 60: (10 + 4) and (5 + 20) wide."""
    rows = fixed_rows(BATCH, token_budget=60)
    assert [each.tolist() for each in rows] == [[0, 1], [2, 3]]
    assert padded_tokens([BATCH.select(each) for each in rows]) == 2 * 14 + 2 * 25
    assert num_tokens(BATCH) == 19 + 27
    assert [len(each) for each in fixed_rows(BATCH, token_budget=1)] == [1, 1, 1, 1]


def test_computed_tokens_by_hand() -> None:
    """Two prompts of 18 and 77 tokens with three answers each; behind a shared one the last token of each is
    left out."""
    grouped = rollouts_of(LENGTHS[:6], vocabulary=100, num_generations=3)
    answers = (34 + 32 + 12, 15 + 52 + 34)
    assert train.computed_tokens(grouped, "padded", 1) == 3 * (18 + 77) + sum(answers)
    shared = (18 + answers[0] - 3, 77 + answers[1] - 3)
    assert train.computed_tokens(grouped, "shared", 200) == sum(shared)
    assert train.computed_tokens(grouped, "shared", 1000) == 2 * max(shared), "in one rectangle"


def test_answers_to_one_prompt_share_its_tokens() -> None:
    grouped = rollouts_of(LENGTHS[:6], vocabulary=100, num_generations=3)
    assert grouped.prompt_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert grouped.prompts.lengths.tolist() == [18, 18, 18, 77, 77, 77]
    assert grouped.responses.lengths.tolist() == [length for _, length in LENGTHS[:6]]
    assert np.array_equal(grouped.prompts[0], grouped.prompts[2])


def test_arms_that_differ_are_told() -> None:
    assert_alike((0.1, 1.0), (0.1, 1.0), "float32")
    for found in ((0.2, 1.0), (0.1, 1.1)):
        with pytest.raises(AssertionError):
            assert_alike(found, (0.1, 1.0), "float32")


def quick(folder: Path) -> Options:
    return Options(quick=True, pairs=2, model=None, folder=folder, say=lambda line: None)


def assert_measured(results: list[Result], names: set[str]) -> None:
    assert {result.case for result in results} == names
    for result in results:
        assert len(result.ours) == len(result.baseline) == 2
        assert min(result.ours + result.baseline) > 0


@pytest.mark.slow
def test_training_against_a_plain_loop(tmp_path: Path) -> None:
    """Losses and gradients of the arms are compared inside."""
    shared = {f"shared prompts, short answers, {what}" for what in ("update", "log-probs")}
    assert_measured(train.measure(quick(tmp_path)), {"", *shared})


@pytest.mark.slow
def test_training_against_a_padded_loop(tmp_path: Path) -> None:
    (result,) = results = train_padded.measure(quick(tmp_path))
    assert_measured(results, {""})
    counted = result.notes["padded_tokens"] / result.notes["tokens"]  # type: ignore[operator]
    assert result.goal is not None and result.goal.limit == pytest.approx(0.9 * counted)


@pytest.mark.slow
def test_log_probs_by_chunks_against_all_logits(tmp_path: Path) -> None:
    results = logprobs.measure(quick(tmp_path))
    assert len(results) == 5
    both = [each for each in results if each.case.startswith("memory")]
    assert all(each.figure < 1 for each in both), "chunks take less"
