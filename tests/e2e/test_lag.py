"""Training that does not wait for generation, on actors: the engine beside the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.reporting.metrics_log import read_metrics
from tests.command_line import CommandLine
from tests.e2e.runs import rollouts

pytestmark = [pytest.mark.actors, pytest.mark.timeout(600)]


def test_a_batch_is_sampled_while_the_one_before_it_is_trained_on(
    rlhf_ray: CommandLine, workplace: Path, online_run: Path
) -> None:
    run = workplace / "runs" / "lag"
    finished = rlhf_ray.run("train", "online.yaml", f"output_dir={run}", "online.max_lag=1")
    assert finished.code == 0, finished.err
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["lag/max"] for row in rows] == [0.0, 1.0, 1.0, 1.0, 1.0]
    for step, row in enumerate(rows):
        # In float32 trainer and engine agree on the same weights, and no longer on those of a step before.
        assert (float(row["mismatch/logprob_diff_max"]) > 1e-3) == (step > 0)
        assert ("time/wait" in row) == (step < 4), "beside the last step nothing is left to generate"
        samples = rollouts(run, step)
        assert {(s["version_min"], s["version_max"]) for s in samples} == {
            (max(0, step - 1), max(0, step - 1))
        }
        assert [s["prompt_id"] for s in samples] == [s["prompt_id"] for s in rollouts(online_run, step)]
    for row in (rows[0], rows[2]):
        assert float(row["sync/probe_mean"]) < 1e-4
        assert row["sync/probe_followed"] == pytest.approx(1.0, abs=1e-2)
