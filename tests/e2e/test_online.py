"""What the metrics and the lineage of a plain PPO run must say."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.reporting.metrics_log import read_metrics
from tests.e2e.runs import rollouts, weights

pytestmark = [
    pytest.mark.actors,
    pytest.mark.timeout(900),  # the first test waits for whole runs
]


def test_every_sample_is_of_the_current_weights(online_run: Path) -> None:
    """A stale prefix cache, a stale head, or a wrong version would show: trainer and sampler would differ."""
    for step, row in enumerate(read_metrics(online_run / "metrics.jsonl")):
        assert float(row["mismatch/logprob_diff_max"]) < 1e-4, step
        assert {(sample["version_min"], sample["version_max"]) for sample in rollouts(online_run, step)} == {
            (step, step)
        }


def test_the_first_step_starts_at_the_reference_and_later_ones_leave_it(online_run: Path) -> None:
    first, *later = read_metrics(online_run / "metrics.jsonl")
    assert abs(float(first["kl/per_token"])) < 1e-6
    assert first["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert all(float(row["kl/per_sequence"]) > 0.01 for row in later)


def test_syncs_are_verified_when_they_are_to_be(online_run: Path) -> None:
    """The first and every third version: what steps 0 and 2 publish."""
    rows = read_metrics(online_run / "metrics.jsonl")
    assert ["sync/probe_mean" in row for row in rows] == [True, False, True, False, False]
    for row in (rows[0], rows[2]):
        assert float(row["sync/probe_mean"]) < 1e-4
        assert float(row["sync/probe_moved"]) > 0.01
        assert row["sync/probe_followed"] == pytest.approx(1.0, abs=1e-2)


def test_every_prompt_is_used_once_an_epoch(online_run: Path) -> None:
    """Five steps of six prompts are an epoch of sixteen and most of a second."""
    used = [
        row["prompt_id"] for step in range(5) for row in rollouts(online_run, step) if row["sample_id"] == 0
    ]
    assert len(used) == 30
    assert len(set(used[:16])) == 16
    assert len(set(used[16:])) == 14


def test_the_adaptive_coefficient_follows_ziegler(online_run: Path) -> None:
    """beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), Ziegler et al. 2019, section 2.2."""
    rows = read_metrics(online_run / "metrics.jsonl")
    beta = 0.05
    for row in rows:
        assert row["kl/coef"] == pytest.approx(beta, rel=1e-9)
        error = min(max(float(row["kl/per_sequence"]) / 1.0 - 1, -0.2), 0.2)
        beta *= 1 + error * 12 / 10_000


def test_the_schedule_ends_at_zero(online_run: Path) -> None:
    """One optimizer step a step: 1e-3 (1 - step / 5)."""
    rates = [float(row["policy/learning_rate"]) for row in read_metrics(online_run / "metrics.jsonl")]
    assert rates == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4], rel=1e-6)


def test_advantages_are_white_and_the_reward_is_the_functions(online_run: Path) -> None:
    for step in range(5):
        rows = rollouts(online_run, step)
        for row in rows:
            text = row["response"]
            expected = sum(letter in "aeiou" for letter in text) / max(1, len(text))
            assert row["reward"] == row["reward/vowels"] == pytest.approx(expected, abs=1e-6)
        tokens = [(row["advantage"], len(row["response_ids"])) for row in rows]
        mean = sum(value * count for value, count in tokens) / sum(count for _, count in tokens)
        assert mean == pytest.approx(0.0, abs=1e-5)


def test_the_model_that_is_saved_is_the_trained_one(online_run: Path, workplace: Path) -> None:
    before, after = weights(workplace / "tiny"), weights(online_run / "model")
    assert before.keys() == after.keys()
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert all(1e-4 < distance < 2e-2 for distance in moved.values()), moved
