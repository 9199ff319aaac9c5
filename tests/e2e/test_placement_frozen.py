"""Whole runs whose frozen models are held in parts or served by vLLM, against one where they are neither."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_ray.config.schema import ModelSection
from rlhf_ray.models.loading import load_scalar_model, load_tokenizer, save_model_folder
from tests.command_line import CommandLine
from tests.e2e.runs import rollouts, untimed

pytestmark = [pytest.mark.actors, pytest.mark.slow, pytest.mark.timeout(900)]


def run(rlhf_ray: CommandLine, name: str, *overrides: str) -> Path:
    """Two steps of PPO against a reward model."""
    finished = rlhf_ray.run(
        "train",
        "online.yaml",
        f"output_dir=runs/{name}",
        "online.rewards=[{type: model, path: reward-model}]",
        "online.num_steps=2",
        *overrides,
        timeout=400,
    )
    assert finished.code == 0, finished.err
    return rlhf_ray.folder / "runs" / name


@pytest.fixture(scope="module")
def plain(rlhf_ray: CommandLine) -> Path:
    policy = ModelSection(path=str(rlhf_ray.folder / "tiny"))
    network = load_scalar_model(policy, seed=3)
    with torch.no_grad():
        network.score.weight.mul_(30)
    tensors = dict(network.named_parameters())
    save_model_folder(network, tensors, load_tokenizer(policy), rlhf_ray.folder / "reward-model")
    return run(rlhf_ray, "frozen-plain")


@pytest.mark.parametrize(
    "overrides",
    [
        ["placement.reward.count=2", "placement.reference.count=2"],
        ["placement.reference.backend=vllm"],
        ["placement.reward.backend=vllm"],
    ],
    ids=["parts", "reference", "reward"],
)
def test_frozen_models_say_the_same_wherever_they_run(
    rlhf_ray: CommandLine, plain: Path, overrides: list[str], request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    other = run(rlhf_ray, f"frozen-{name}", *overrides)
    ours, theirs = rollouts(other, 1), rollouts(plain, 1)
    assert [row["response"] for row in ours] == [row["response"] for row in theirs]
    one, two = untimed(plain)[0], untimed(other)[0]
    assert two.keys() == one.keys()
    for metric in one.keys() - {"stage"}:
        assert two[metric] == pytest.approx(one[metric], rel=1e-3, abs=1e-4), metric
