"""vLLM with weights that change while it answers: every token against the weights and the cache it is of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from transformers import DynamicCache, PreTrainedModel

pytest.importorskip("vllm")

from actors.calls import Turns
from actors.engine_calls import RemoteEngineCalls
from actors.group import ActorGroup, Timeline
from actors.host import AsyncHost
from actors.roles import RemoteStreamingGenerator
from rlhf_ray.config.schema import EngineSection, KVOnUpdate
from rlhf_ray.types import Prompts, Rollouts, SamplingSpec
from rlhf_ray.weights.source import ModuleWeightSource
from rlhf_ray.weights.sync import MultiEngineClient, TransferSpec, WeightPublisher
from tests.actors.test_vllm_generator import (
    PROBE,
    assert_logprobs_are_the_trainers,
    load,
    make_prompts,
    perturb,
    trainer_logprobs,
)
from tests.engine_process import free_port
from tests.tiny import tiny_model_folder

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_cluster")]

LONG = SamplingSpec(max_completion_length=320, min_completion_length=320, num_generations=2)
EOS = 2
PROMPTS = make_prompts(150, 40)
"""The first is longer than a block of the prefix cache."""


@dataclass
class Engine:
    generator: RemoteStreamingGenerator
    model: PreTrainedModel
    publisher: WeightPublisher

    def generate(self, prompts: Prompts, sampling: SamplingSpec, seed: int = 0) -> Rollouts:
        return Rollouts.concat([each.result() for each in self.generator.generate(prompts, sampling, seed)])

    def change_in_flight(self) -> tuple[Rollouts, PreTrainedModel, PreTrainedModel]:
        """Long answers, and the weights that began them and those that ended them, published as version 1."""
        self.publisher.publish(0)
        old = load(Path(self.model.config._name_or_path))
        new = load(Path(self.model.config._name_or_path))
        perturb(new, 0.02, seed=1)
        pending = self.generator.generate(PROMPTS, LONG, 7)
        self.generate(PROMPTS.select([1]), replace(LONG, max_completion_length=40, min_completion_length=40))
        # The long answers have about forty tokens too.
        self.model.load_state_dict(new.state_dict())
        self.publisher.publish(1)
        return Rollouts.concat([each.result() for each in pending]), old, self.model


def engine_that(folder: Path, logs: Path, kv_on_update: KVOnUpdate) -> Iterator[Engine]:
    group = ActorGroup(
        "engine",
        [ray.remote(AsyncHost).options(num_cpus=0).remote("engine", str(logs / f"{kv_on_update}.log"))],
        Turns(enabled=False),
        Timeline(),
        timeout=120.0,
    )
    arguments = {
        "model_folder": str(folder),
        "section": EngineSection(dtype="float32", cpu_kv_cache_gib=0.05),
        "max_model_len": 500,
        "threads": 1,
        "seed": 0,
        "kv_on_update": kv_on_update,
    }
    engine = "rlhf_ray.engines.vllm_generator:VLLMGenerator"
    group.build(
        "rlhf_ray.engines.streaming:StreamingGenerator", [{"engine": engine, "arguments": arguments}], 120.0
    )
    group.wait_until_built()
    model = load(folder)
    publisher = WeightPublisher(
        ModuleWeightSource(model, torch.float32, 0),
        TransferSpec("gloo", 1, "127.0.0.1", free_port(), timeout=60.0),
        rank=0,
        client=MultiEngineClient([RemoteEngineCalls(group.handles[0], "engine", 60.0)], 1),
    )
    yield Engine(RemoteStreamingGenerator(group), model, publisher)
    publisher.close()
    group.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("tied"))


@pytest.fixture
def keeping(folder: Path, tmp_path: Path) -> Iterator[Engine]:
    yield from engine_that(folder, tmp_path, "keep")


@pytest.fixture
def dropping(folder: Path, tmp_path: Path) -> Iterator[Engine]:
    yield from engine_that(folder, tmp_path, "drop")


@torch.no_grad()
def continued_logprobs(
    old: PreTrainedModel, new: PreTrainedModel, tokens: np.ndarray, cached: int
) -> np.ndarray:
    """Of the tokens after the first `cached` + 1, by `new` on a cache whose first entries `old` made."""
    ids = torch.tensor(tokens.tolist())[None]
    cache = DynamicCache()
    old(ids[:, :cached], past_key_values=cache, use_cache=True)
    logits = new(ids[:, cached:-1], past_key_values=cache, use_cache=True).logits[0]
    logits[:, EOS] = -torch.inf  # a long answer is one that may not end before
    return logits.log_softmax(-1).gather(-1, ids[0, cached + 1 :, None])[:, 0].numpy()


def fresh_logprobs(model: PreTrainedModel, rollouts: Rollouts, row: int) -> np.ndarray:
    """Of the whole answer, by one model alone."""
    return continued_logprobs(model, model, rollouts.sequences[row], len(rollouts.prompts[row]) - 1)


def num_old(rollouts: Rollouts) -> list[int]:
    """Of each row, how many tokens the earlier weights sampled; these come first, and both sampled some."""
    counts = []
    for versions in rollouts.versions:
        assert set(versions.tolist()) == {0, 1}, "the update did not fall into the answer"
        assert (np.diff(versions.astype(int)) >= 0).all()
        counts.append(int((versions == 0).sum()))
    return counts


def assert_old_tokens_are_the_old_weights(rollouts: Rollouts, old: PreTrainedModel) -> None:
    for row, count in enumerate(num_old(rollouts)):
        expected = fresh_logprobs(old, rollouts, row)[:count]
        np.testing.assert_allclose(rollouts.logprobs[row][:count], expected, atol=2e-4)


def test_kept_cache_goes_on_with_the_new_weights(keeping: Engine) -> None:
    rollouts, old, new = keeping.change_in_flight()
    assert_old_tokens_are_the_old_weights(rollouts, old)
    for row, count in enumerate(num_old(rollouts)):
        # The last token that the old weights sampled is read by the new ones first.
        cached = len(rollouts.prompts[row]) + count - 1
        expected = continued_logprobs(old, new, rollouts.sequences[row], cached)
        np.testing.assert_allclose(rollouts.logprobs[row][count:], expected, atol=2e-4)
        recomputed = fresh_logprobs(new, rollouts, row)[count:]
        assert np.abs(recomputed - expected).max() > 1e-2, "the two caches cannot be told apart"


def test_dropped_cache_is_computed_anew(dropping: Engine) -> None:
    rollouts, old, new = dropping.change_in_flight()
    assert_old_tokens_are_the_old_weights(rollouts, old)
    for row, count in enumerate(num_old(rollouts)):
        expected = fresh_logprobs(new, rollouts, row)[count:]
        np.testing.assert_allclose(rollouts.logprobs[row][count:], expected, atol=2e-4)


def test_new_answers_see_nothing_of_what_earlier_weights_cached(keeping: Engine) -> None:
    """The same prompts again, longer than a block, after and during an update."""
    _, _, new = keeping.change_in_flight()
    later = keeping.generate(PROMPTS, SamplingSpec(max_completion_length=12, num_generations=2))
    assert set(later.versions.values.tolist()) == {1}
    assert_logprobs_are_the_trainers(later, new, 1.0)


def test_a_probe_is_answered_while_others_are(keeping: Engine) -> None:
    keeping.publisher.publish(0)
    pending = keeping.generator.generate(PROMPTS, LONG, 3)
    (probe,) = keeping.generator.probe(PROBE)
    expected = trainer_logprobs(keeping.model, PROBE)
    np.testing.assert_allclose(probe.result().values, expected.values, atol=1e-4)
    assert not [each for each in pending if ray.wait([each.value], timeout=0)[0]], "still being answered"
    for each in pending:
        rollouts = each.result()
        for row, logprobs in enumerate(rollouts.logprobs):
            np.testing.assert_allclose(logprobs, fresh_logprobs(keeping.model, rollouts, row), atol=2e-4)


def test_answers_that_are_given_up_free_the_engine(keeping: Engine) -> None:
    keeping.publisher.publish(0)
    pending = keeping.generator.generate(PROMPTS, LONG, 3)
    short = keeping.generator.generate(PROMPTS.select([1]), SamplingSpec(max_completion_length=4), 3)
    assert keeping.generator.first_done([*pending, *short], 1) == [2]
    keeping.generator.give_up(pending)
    assert [each.result() for each in pending] == [None, None]
    assert len(keeping.generate(PROMPTS, SamplingSpec(max_completion_length=4))) == 2


def test_equal_seeds_give_equal_answers_whatever_is_beside_them(keeping: Engine) -> None:
    keeping.publisher.publish(0)
    sampling = SamplingSpec(max_completion_length=24, num_generations=2)
    alone = keeping.generate(PROMPTS.select([1]), sampling, seed=5)
    both = keeping.generate(PROMPTS, sampling, seed=5)
    assert both.responses.select([2, 3]).values.tolist() == alone.responses.values.tolist()
