"""Whole runs whose roles share devices, against one whose roles do not: the same samples and weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.reporting.metrics_log import read_metrics
from tests.command_line import CommandLine
from tests.e2e.runs import assert_same_weights, rollouts, two_steps, untimed

pytestmark = [pytest.mark.actors, pytest.mark.slow, pytest.mark.timeout(900)]


ZERO_1 = "training.zero_stage=1"


@pytest.fixture(scope="module")
def apart(rlhf_ray: CommandLine) -> Path:
    return two_steps(rlhf_ray, "apart", ZERO_1)


@pytest.mark.parametrize("mode", ["colocated", "disaggregated"])
def test_where_roles_are_changes_nothing(rlhf_ray: CommandLine, apart: Path, mode: str) -> None:
    together = two_steps(rlhf_ray, mode, ZERO_1, f"placement.mode={mode}")
    assert untimed(together) == untimed(apart)
    assert rollouts(together, 1) == rollouts(apart, 1)
    assert_same_weights(together, apart)
    moved = [row for row in read_metrics(together / "metrics.jsonl") if "time/hand_over" in row]
    assert moved, "policy and critic rest in turn, in both modes"
    log = (together / "logs" / "engine.log").read_text()
    assert ("sleep mode is not supported on CPU" in log) == (mode == "colocated"), "vLLM was asked to"


def test_a_reference_and_sequences_in_parts(rlhf_ray: CommandLine, apart: Path) -> None:
    """Two ranks of everything that is trained share every sequence, and two hold the reference."""
    parts = two_steps(
        rlhf_ray,
        "parts",
        ZERO_1,
        "placement.mode=colocated",
        "placement.policy.count=2",
        "placement.critic.count=2",
        "placement.reference.count=2",
        "training.sequence_parallel_size=2",
        "training.zero_stage=3",
        "training.offload_optimizer=cpu",
    )
    one, two = untimed(apart)[0], untimed(parts)[0]
    assert two.keys() == one.keys()
    for name in one.keys() - {"stage"}:
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
