"""A reward model in a vLLM pooling engine, against the reward actor that computes as the trainer does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from rlhf_ray.config.schema import (
    DatasetSection,
    EngineSection,
    ModelReward,
    ModelSection,
    Reward,
    RewardSection,
)
from rlhf_ray.errors import ModelError
from rlhf_ray.types import Rollouts
from rlhf_ray.workers.rewards import RewardWorker
from rlhf_ray.workers.scalar import RewardTrainerWorker
from rlhf_ray.workers.served import RewardEngine
from tests.engine_process import EngineProcess, rest_and_wake
from tests.local_roles import CPU
from tests.ranks import EXACT, worker_spec
from tests.samples import random_rollouts
from tests.tiny import tiny_model_folder

pytestmark = [pytest.mark.actors, pytest.mark.slow]

LONGEST = 64
Sources = tuple[tuple[Reward, tuple[ModelSection, ...]], ...]
PROXY = ModelReward(type="model", name="proxy")


def engine(dtype: str) -> RewardEngine:
    return RewardEngine(EngineSection(dtype=dtype, cpu_kv_cache_gib=0.05), LONGEST)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def saved(policy: ModelSection, tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    """As the reward stage saves it, with a head so wide that a sigmoid would show."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    section = RewardSection(dataset=DatasetSection(path="unread.jsonl"))
    trainer = RewardTrainerWorker(policy, worker_spec(EXACT), section)
    with torch.no_grad():
        trainer.engine.module.model.score.weight.mul_(60)
    trainer.save_model(folder)
    return ModelSection(path=str(folder))


def rollouts() -> Rollouts:
    """The second answer is cut at the longest length that there may be, so that its EOS goes beyond."""
    whole = random_rollouts([(4, 9), (40, 24), (7, 3), (1, 1), (12, 40)])
    whole.responses[1][-1] = 50
    whole.finished[1] = False
    return whole


def sources(model: ModelSection) -> Sources:
    return ((PROXY, (model,)),)


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_served_scores_are_those_of_the_reward_actor(
    policy: ModelSection, saved: ModelSection, dtype: str, share: float
) -> None:
    """To a share of what the scores differ by."""
    expected = RewardWorker(policy, sources(saved), EXACT, CPU, threads=1, tokens={}).score(rollouts())
    assert expected.total.std() > 0.5 and (expected.total < 0).any(), "no sigmoid gives these"
    process = EngineProcess(
        RewardWorker, policy, sources(saved), EXACT, CPU, threads=1, tokens={}, engine=engine(dtype)
    ).wait_until_built()
    try:
        found = process.call("score", rollouts()).result()
        np.testing.assert_allclose(found.total, expected.total, atol=share * expected.total.std())
        assert found.is_valid.all()
        rest_and_wake(process)
        again = process.call("score", rollouts()).result()
        np.testing.assert_allclose(again.total, found.total, atol=share * expected.total.std())
    finally:
        process.stop()


def test_a_language_model_is_refused(policy: ModelSection) -> None:
    with pytest.raises(ModelError, match="has no head that gives a score, and vLLM makes none"):
        engine("float32").start(policy, policy, threads=1)
