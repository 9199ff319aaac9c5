"""Models that are only read and of which every rank holds a part, against whole ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rlhf_ray.config.schema import (
    EnsembleReward,
    FunctionReward,
    ModelReward,
    ModelSection,
    Reward,
    TrainingSection,
)
from rlhf_ray.engines.deepspeed_engine import World
from rlhf_ray.engines.partitioned import FrozenParts
from rlhf_ray.errors import RewardError
from rlhf_ray.models.loading import load_scalar_model, load_tokenizer, save_model_folder
from rlhf_ray.types import Rollouts, Scores
from rlhf_ray.workers.frozen import FrozenModel, ReferenceWorker
from rlhf_ray.workers.rewards import RewardWorker
from tests.local_roles import CPU
from tests.ranks import run_ranks
from tests.samples import random_rollouts
from tests.tiny import tiny_model_folder

TRAINING = TrainingSection(precision="float32", tokens_per_micro_batch=40)
Sources = list[tuple[Reward, tuple[ModelSection, ...]]]


def rollouts() -> Rollouts:
    """Five rows: two ranks have unequal shares of them, and one takes an empty micro-batch."""
    return random_rollouts([(4, 9), (7, 3), (12, 21), (5, 2), (3, 17)])


@dataclass(frozen=True)
class Models:
    """Fields: broken: gives every answer NaN."""

    policy: ModelSection
    rewards: tuple[ModelSection, ...]
    broken: ModelSection

    def reward_worker(self, world: World | None = None) -> RewardWorker:
        """A model, one that fails, and an ensemble; between them what only the first rank is asked for."""
        members = self.rewards[1:]
        ensemble = EnsembleReward(
            type="ensemble",
            name="both",
            paths=tuple(model.path for model in members),
            aggregate="pessimistic",
        )
        failing = ModelReward(type="model", name="broken", on_error="mask", weight=0)
        sources: Sources = [
            (failing, (self.broken,)),
            (ModelReward(type="model", name="single"), self.rewards[:1]),
            (FunctionReward(type="function", name="long", function="tests.fakes:num_characters"), ()),
            (ensemble, members),
        ]
        return RewardWorker(self.policy, sources, TRAINING, CPU, threads=1, tokens={}, world=world)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Reward models as their stage saves them, with heads wide enough that scores differ."""
    folder = tmp_path_factory.mktemp("models")
    policy = ModelSection(path=str(tiny_model_folder(folder / "policy")))
    found = []
    for seed, scale in enumerate((30, 30, 30, float("nan"))):
        network = load_scalar_model(policy, seed=seed)
        with torch.no_grad():
            network.score.weight.mul_(scale)
        path = folder / str(seed)
        save_model_folder(network, dict(network.named_parameters()), load_tokenizer(policy), path)
        found.append(ModelSection(path=str(path)))
    return Models(policy, tuple(found[:3]), found[3])


@dataclass(frozen=True)
class Found:
    """What a rank says. Fields: share: of the large weights that it holds."""

    logprobs: NDArray[np.float32]
    scores: Scores
    sources: list[str]
    failure: str
    share: float


def in_parts(world: World, models: Models) -> Found:
    """Everything is asked again after resting."""
    reference = ReferenceWorker(models.policy, TRAINING, CPU, threads=1, world=world)
    reward = models.reward_worker(world)
    logprobs, scores = reference.logprobs(rollouts(), 0.7).values, reward.score(rollouts())
    for worker in (reference, reward):
        worker.rest()
        worker.wake()
    np.testing.assert_array_equal(reference.logprobs(rollouts(), 0.7).values, logprobs)
    np.testing.assert_array_equal(reward.score(rollouts()).total, scores.total)
    held = [reference.model, *(source.model for source in reward.models)]
    strict: Sources = [(ModelReward(type="model", name="broken", on_error="retry"), (models.broken,))]
    failing = RewardWorker(models.policy, strict, TRAINING, CPU, threads=1, tokens={}, world=world)
    with pytest.raises(RewardError) as caught:
        failing.score(rollouts())
    return Found(logprobs, scores, list(reward.sources), str(caught.value), share_of_large(held))


def share_of_large(models: list[object]) -> float:
    large = []
    for model in models:
        assert isinstance(model, FrozenModel) and isinstance(model.module, FrozenParts)
        own = [p for p in model.module.engine.module.parameters() if p.ds_numel > 10_000]
        assert own
        large += own
    return sum(p.ds_tensor.numel() for p in large) / sum(p.ds_numel for p in large)


@pytest.fixture(scope="module")
def ranks(models: Models, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return run_ranks(in_parts, 2, tmp_path_factory.mktemp("ranks"), models)


def test_each_rank_holds_half(ranks: list[Found]) -> None:
    assert [found.share for found in ranks] == pytest.approx([0.5, 0.5], abs=0.01)


def test_a_reference_in_parts_is_the_whole(models: Models, ranks: list[Found]) -> None:
    expected = ReferenceWorker(models.policy, TRAINING, CPU, threads=1).logprobs(rollouts(), 0.7).values
    for found in ranks:
        np.testing.assert_allclose(found.logprobs, expected, atol=1e-5)


def test_reward_models_in_parts_are_the_whole_ones(models: Models, ranks: list[Found]) -> None:
    expected = models.reward_worker().score(rollouts())
    assert expected.parts["single"].std() > 0.1
    for found in ranks:
        for name in ("single", "both"):
            np.testing.assert_allclose(found.scores.parts[name], expected.parts[name], atol=1e-5)
        np.testing.assert_allclose(found.scores.spreads["both"], expected.spreads["both"], atol=1e-5)
    np.testing.assert_allclose(ranks[0].scores.total, expected.total, atol=1e-5)


def test_what_has_no_model_is_asked_once(ranks: list[Found]) -> None:
    assert ranks[0].sources == ["broken", "single", "long", "both"]
    assert ranks[1].sources == ["broken", "single", "both"]


def test_a_model_that_fails_does_so_on_every_rank_and_is_not_asked_again(ranks: list[Found]) -> None:
    for found in ranks:
        assert found.failure == "reward 'broken': the model's score of sample 0 of prompt 0 is nan"
        assert np.isnan(found.scores.parts["broken"]).all()
        assert found.scores.is_valid.all(), "what is only watched keeps no sample from training"
        assert found.scores.events["reward/broken/retries"] == 0
