"""Two of everything, at ZeRO 3, against one of everything: the same samples, the same step."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.reporting.metrics_log import read_metrics
from tests.command_line import CommandLine
from tests.e2e.runs import rollouts, untimed, weights

pytestmark = [
    pytest.mark.actors,
    pytest.mark.timeout(900),  # the first test waits for whole runs
]

SAMPLED = (
    "prompt_id",
    "sample_id",
    "prompt",
    "response_ids",
    "finish_reason",
    "version_min",
    "reward/vowels",
)
COMPUTED = ("reward", "kl", "advantage")


@pytest.fixture(scope="module")
def run(rlhf_ray: CommandLine) -> Path:
    finished = rlhf_ray.run(
        "train",
        "online.yaml",
        "output_dir=runs/two",
        "placement.policy.count=2",
        "placement.critic.count=2",
        "placement.engine.count=2",
        "training.zero_stage=3",
        "online.num_steps=2",
        "sync.verify_first=2",
        timeout=280,
    )
    assert finished.code == 0, finished.err
    return rlhf_ray.folder / "runs" / "two"


def test_two_engines_sample_what_one_does(run: Path, online_run: Path) -> None:
    """The seed of a sample is its own, wherever it is sampled."""
    one, two = rollouts(online_run, 0), rollouts(run, 0)
    assert [[row[name] for name in SAMPLED] for row in two] == [
        [row[name] for name in SAMPLED] for row in one
    ]
    for ours, theirs in zip(two, one, strict=True):
        for name in COMPUTED:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name


def test_two_ranks_take_the_step_of_one(run: Path, online_run: Path) -> None:
    one, two = untimed(online_run)[0], untimed(run)[0]
    assert two.keys() == one.keys()
    for name in one.keys() - {"stage"}:
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


def test_both_engines_hold_what_two_ranks_published(run: Path) -> None:
    for row in read_metrics(run / "metrics.jsonl"):
        assert float(row["sync/probe_mean"]) < 1e-4
        assert row["sync/probe_followed"] == pytest.approx(1.0, abs=1e-2)
    assert {row["version_min"] for row in rollouts(run, 1)} == {1}


def test_the_saved_model_is_whole(run: Path, online_run: Path) -> None:
    two, one = weights(run / "model"), weights(online_run / "model")
    assert {name: tensor.shape for name, tensor in two.items()} == {
        name: tensor.shape for name, tensor in one.items()
    }
