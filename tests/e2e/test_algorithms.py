"""An algorithm without a critic, and without a reference, on actors."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.reporting.metrics_log import read_metrics
from tests.command_line import CommandLine
from tests.e2e.runs import rollouts

pytestmark = [pytest.mark.slow, pytest.mark.actors, pytest.mark.timeout(600)]

OVERRIDES = [
    "online.algorithm=dapo",
    "online.kl_target=null",
    "online.track_kl=false",
    "online.num_steps=2",
    "online.prompts_per_step=4",
    "online.recompute_old_logprobs=false",
]


def test_dapo_without_critic_and_reference(rlhf_ray: CommandLine, workplace: Path) -> None:
    """Prompts are drawn until four of them are told apart; only policy, engine and rewards are there."""
    run = workplace / "runs" / "dapo"
    finished = rlhf_ray.run("train", "online.yaml", f"output_dir={run}", *OVERRIDES)
    assert finished.code == 0, finished.err
    for step, row in enumerate(read_metrics(run / "metrics.jsonl")):
        samples = rollouts(run, step)
        assert len(samples) == 8
        assert row["sampling/rounds"] >= 1
        assert not [name for name in row if name.startswith(("critic/", "kl/per"))]
        assert row["reward/frac_zero_std"] == 0.0
        assert {sample["version_max"] for sample in samples} == {step}
        for prompt in {sample["prompt_id"] for sample in samples}:
            pair = [sample["advantage"] for sample in samples if sample["prompt_id"] == prompt]
            assert sum(pair) == pytest.approx(0.0, abs=1e-4)
            assert abs(pair[0]) > 0.1
    assert not list((run / "logs").glob("critic*"))
    assert not list((run / "logs").glob("reference*"))
