"""Placement and attention that only a CUDA machine can try."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from rlhf_ray.reporting.metrics_log import read_metrics
from tests.command_line import CommandLine

pytestmark = [pytest.mark.gpu, pytest.mark.actors]


def run(rlhf_ray: CommandLine, name: str, *overrides: str) -> list[dict[str, object]]:
    finished = rlhf_ray.run(
        "train",
        "online.yaml",
        f"output_dir=runs/{name}",
        "online.num_steps=2",
        "training.precision=mixed",
        "training.zero_stage=2",
        "engine.dtype=bfloat16",
        "engine.gpu_memory_utilization=0.8",
        "sync.tolerance=0.05",
        *overrides,
        timeout=280,
    )
    assert finished.code == 0, finished.err
    return [dict(row) for row in read_metrics(rlhf_ray.folder / "runs" / name / "metrics.jsonl")]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_colocated_roles_hand_a_gpu_over(rlhf_ray: CommandLine, workplace: Path, zero_stage: int) -> None:
    """An engine that takes 0.8 of the GPU leaves room for nothing while it is awake."""
    rows = run(
        rlhf_ray, f"shared-{zero_stage}", "placement.mode=colocated", f"training.zero_stage={zero_stage}"
    )
    assert all(float(str(row["sync/probe_mean"])) < 0.05 for row in rows)
    assert any("time/hand_over" in row for row in rows)


@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three GPUs")
def test_a_tensor_parallel_engine_beside_the_trainer(rlhf_ray: CommandLine, workplace: Path) -> None:
    rows = run(rlhf_ray, "apart", "placement.mode=disaggregated", "engine.tensor_parallel_size=2")
    assert all(float(str(row["sync/probe_mean"])) < 0.05 for row in rows)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")
def test_flash_attention_packs(rlhf_ray: CommandLine, workplace: Path) -> None:
    padded = run(rlhf_ray, "padded")
    packed = run(rlhf_ray, "packed", "training.attention=flash_attention_2", "training.packing=true")
    assert float(str(packed[0]["policy/loss"])) == pytest.approx(
        float(str(padded[0]["policy/loss"])), abs=0.05
    )
