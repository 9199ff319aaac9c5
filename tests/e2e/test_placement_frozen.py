"""Whole runs whose frozen models are held in parts or served by vLLM, against one where they are neither."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_ray.config.schema import ModelSection
from rlhf_ray.models.loading import load_scalar_model, load_tokenizer, save_model_folder
from tests.command_line import CommandLine
from tests.e2e.runs import rollouts, two_steps, untimed

pytestmark = [pytest.mark.actors, pytest.mark.slow, pytest.mark.timeout(900)]


REWARD_MODEL = "online.rewards=[{type: model, path: reward-model}]"


@pytest.fixture(scope="module")
def plain(rlhf_ray: CommandLine) -> Path:
    policy = ModelSection(path=str(rlhf_ray.folder / "tiny"))
    network = load_scalar_model(policy, seed=3)
    with torch.no_grad():
        network.score.weight.mul_(30)
    tensors = dict(network.named_parameters())
    save_model_folder(network, tensors, load_tokenizer(policy), rlhf_ray.folder / "reward-model")
    return two_steps(rlhf_ray, "frozen-plain", REWARD_MODEL)


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
    other = two_steps(rlhf_ray, f"frozen-{name}", REWARD_MODEL, *overrides)
    ours, theirs = rollouts(other, 1), rollouts(plain, 1)
    assert [row["response"] for row in ours] == [row["response"] for row in theirs]
    one, two = untimed(plain)[0], untimed(other)[0]
    assert two.keys() == one.keys()
    for metric in one.keys() - {"stage"}:
        assert two[metric] == pytest.approx(one[metric], rel=1e-3, abs=1e-4), metric
