"""One step on a CUDA machine, with the same configuration as on a laptop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_ray.reporting.metrics_log import read_metrics
from rlhf_ray.reporting.run_folder import RunFolder
from tests.command_line import CommandLine
from tests.e2e.runs import rollouts

pytestmark = [pytest.mark.gpu, pytest.mark.actors]

TOLERANCE = 0.05
"""Nats a token: bfloat16 autocast against a bfloat16 engine."""


def test_a_step_is_trained_published_and_verified(rlhf_ray: CommandLine, workplace: Path) -> None:
    """With one GPU all roles share it and weights go by CUDA IPC; with a GPU a role they go over NCCL."""
    finished = rlhf_ray.run(
        "train",
        "online.yaml",
        "output_dir=runs/gpu",
        "online.num_steps=2",
        "training.precision=mixed",
        "engine.dtype=bfloat16",
        "engine.gpu_memory_utilization=0.3",
        f"sync.tolerance={TOLERANCE}",
        timeout=280,
    )
    assert finished.code == 0, finished.err
    run = workplace / "runs" / "gpu"
    expected = "nccl" if torch.cuda.device_count() >= 5 else "ipc"
    assert f"backend='{expected}'" in (RunFolder(run).logs / "engine.log").read_text()
    first, second = read_metrics(run / "metrics.jsonl")
    assert first["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert abs(float(first["kl/per_token"])) < 0.02
    for row in (first, second):
        assert float(row["sync/probe_mean"]) < TOLERANCE
        assert float(row["sync/probe_moved"]) > 0.01
        assert row["sync/probe_followed"] == pytest.approx(1.0, abs=0.2)
        assert float(row["mismatch/logprob_diff_mean"]) < TOLERANCE
    assert {row["version_min"] for row in rollouts(run, 1)} == {1}
