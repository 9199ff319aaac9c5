"""Training that does not wait for generation, on actors: the engine beside the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.reporting.metrics_log import MetricsRow, read_metrics
from tests.command_line import CommandLine
from tests.e2e.runs import rollouts

pytestmark = [pytest.mark.actors, pytest.mark.timeout(600)]


def run_ahead(rlhf_ray: CommandLine, name: str, *overrides: str) -> tuple[Path, list[MetricsRow]]:
    run = rlhf_ray.folder / "runs" / name
    words = ["train", "online.yaml", f"output_dir={run}", "online.max_lag=1", *overrides]
    finished = rlhf_ray.run(*words)
    assert finished.code == 0, finished.err
    return run, read_metrics(run / "metrics.jsonl")


def assert_synced(rows: list[MetricsRow]) -> None:
    """In float32 the weights that arrive are the trainer's, though the engine was at other answers."""
    for row in (rows[0], rows[2]):
        assert float(row["sync/probe_mean"]) < 1e-4
        assert row["sync/probe_followed"] == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("kv_on_update", ["keep", pytest.param("drop", marks=pytest.mark.slow)])
def test_weights_change_while_the_engine_answers(
    rlhf_ray: CommandLine, online_run: Path, kv_on_update: str
) -> None:
    options = [f"online.kv_on_update={kv_on_update}", "online.max_completion_length=60"]
    run, rows = run_ahead(rlhf_ray, f"lag-{kv_on_update}", *options)
    assert_synced(rows)
    for step, row in enumerate(rows):
        samples = rollouts(run, step)
        prompts = [sample["prompt_id"] for sample in samples if sample["sample_id"] == 0]
        same_step = {sample["prompt_id"] for sample in rollouts(online_run, step)}
        assert prompts == sorted(same_step), "those of the synchronous run, in an order that does not depend"
        for sample in samples:
            assert max(0, step - 1) <= sample["version_min"] <= sample["version_max"] <= step
        oldest = min(sample["version_min"] for sample in samples)
        assert row["lag/max"] == step - oldest
        # Only tokens of the current weights have the log-probs that the trainer computes.
        if row["lag/max"] == 0:
            assert float(row["mismatch/logprob_diff_max"]) < 1e-4
        else:
            assert float(row["mismatch/logprob_diff_max"]) > 1e-3
    assert max(float(row["lag/max"]) for row in rows) == 1.0


@pytest.mark.slow
def test_an_engine_that_takes_batches_is_one_ahead(rlhf_ray: CommandLine, online_run: Path) -> None:
    run, rows = run_ahead(rlhf_ray, "lag-batches", "engine.backend=transformers")
    assert_synced(rows)
    assert [row["lag/max"] for row in rows] == [0.0, 1.0, 1.0, 1.0, 1.0]
    for step, row in enumerate(rows):
        assert (float(row["mismatch/logprob_diff_max"]) > 1e-3) == (step > 0)
        samples = rollouts(run, step)
        version = max(0, step - 1)
        assert {(s["version_min"], s["version_max"]) for s in samples} == {(version, version)}
        assert [s["prompt_id"] for s in samples] == [s["prompt_id"] for s in rollouts(online_run, step)]
    waits = [float(row["time/wait"]) for row in rows[:-1]]
    assert all(0 <= wait <= float(row["time/step"]) for wait, row in zip(waits, rows, strict=False))
    assert "time/wait" not in rows[-1], "nothing is left to generate"


@pytest.mark.slow
@pytest.mark.parametrize("max_lag", [0, 1])
def test_the_last_of_those_sampled_to_spare_are_given_up(rlhf_ray: CommandLine, max_lag: int) -> None:
    options = [f"online.max_lag={max_lag}", "online.stragglers=drop", "online.oversample=1.5"]
    run, rows = run_ahead(rlhf_ray, f"spare-{max_lag}", *options)
    assert_synced(rows)
    for step, row in enumerate(rows):
        samples = rollouts(run, step)
        assert len(samples) == 12, "the batch keeps its size"
        assert all(step - max_lag <= sample["version_min"] <= step for sample in samples)
        assert (row["lag/dropped"] == 3.0) or max_lag == 1
    dropped = sum(float(row["lag/dropped"]) for row in rows)
    assert dropped > 0, "more are begun than are trained on"
