"""Frozen models in vLLM engines, against those that compute as the trainer does."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("vllm")

from rlhf_ray.config.schema import EngineSection, ModelSection
from rlhf_ray.errors import ConfigError
from rlhf_ray.types import Ragged, ReferencedPairs, Rollouts
from rlhf_ray.workers.frozen import ReferenceWorker
from rlhf_ray.workers.served import ServedReference
from tests.engine_process import EngineProcess, rest_and_wake
from tests.local_roles import CPU
from tests.ranks import EXACT
from tests.samples import random_rollouts
from tests.tiny import tiny_model_folder

pytestmark = [pytest.mark.actors, pytest.mark.slow]

ENGINE = EngineSection(dtype="float32", cpu_kv_cache_gib=0.05)
LONGEST = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def reference(model: ModelSection) -> ReferenceWorker:
    return ReferenceWorker(model, EXACT, CPU, threads=1)


def rollouts() -> Rollouts:
    """One-token prompts and answers, and the longest row that there may be."""
    return random_rollouts([(4, 9), (1, 1), (7, 3), (40, 24), (5, 1), (1, 30)])


def pairs() -> ReferencedPairs:
    """Two answers to each prompt."""
    first = rollouts()
    lengths = first.prompts.lengths.tolist()
    second = random_rollouts([(length, 5) for length in lengths], seed=1)
    rejected = Ragged.join(first.prompts, second.responses)
    zeros = np.zeros(len(first), dtype=np.float32)
    ones = np.ones(len(first), dtype=np.float32)
    return ReferencedPairs(first.prompts.lengths, first.sequences, rejected, zeros, ones, zeros, zeros)


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-4), ("bfloat16", 0.2)])
def test_a_served_reference_agrees_with_the_trainers(
    model: ModelSection, reference: ReferenceWorker, dtype: str, atol: float
) -> None:
    section = ENGINE.model_copy(update={"dtype": dtype})
    process = EngineProcess(ServedReference, model.path, section, LONGEST, threads=1).wait_until_built()
    try:
        found = process.call("logprobs", rollouts(), 1.0).result()
        expected = reference.logprobs(rollouts(), 1.0)
        assert found.lengths.tolist() == rollouts().responses.lengths.tolist()
        assert expected.values.std() > 0.5
        np.testing.assert_allclose(found.values, expected.values, atol=atol)
        rest_and_wake(process)
        again = process.call("logprobs", rollouts(), 1.0).result()
        np.testing.assert_allclose(again.values, expected.values, atol=atol)
        if dtype == "bfloat16":
            return
        answered, theirs = process.call("answer", pairs()).result(), reference.answer(pairs())
        np.testing.assert_allclose(answered.ref_chosen, theirs.ref_chosen, atol=1e-3)
        np.testing.assert_allclose(answered.ref_rejected, theirs.ref_rejected, atol=1e-3)
        assert len(process.call("logprobs", rollouts().select([]), 1.0).result()) == 0
        with pytest.raises(ConfigError, match=r"at temperature 1 alone, and online\.temperature is 0\.7"):
            process.call("logprobs", rollouts(), 0.7).result()
    finally:
        process.stop()
