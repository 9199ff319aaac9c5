"""What generators share, and the transformers generator against slow, plain code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_ray.config.schema import EngineSection
from rlhf_ray.engines.generation import (
    Sample,
    check_samples,
    make_requests,
    read_eos_ids,
    sample_seed,
)
from rlhf_ray.engines.hf_generator import HFGenerator, _SeededSampler
from rlhf_ray.errors import GenerationError, ModelError, WeightSyncError
from rlhf_ray.types import Prompts, Ragged, SamplingSpec
from tests.tiny import VOCABULARY, tiny_model_folder


def make_prompts(*lengths: int) -> Prompts:
    rng = np.random.default_rng(0)
    count = len(lengths)
    return Prompts(
        ids=np.arange(10, 10 + count),
        messages=tuple(({"role": "user", "content": str(row)},) for row in range(count)),
        token_ids=Ragged.from_rows([rng.integers(3, VOCABULARY, size=n) for n in lengths], np.int32),
        columns=tuple({"row": row} for row in range(count)),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def generator(folder: Path, max_num_seqs: int = 128, version: int = 4) -> HFGenerator:
    section = EngineSection(backend="transformers", dtype="float32", max_num_seqs=max_num_seqs)
    return HFGenerator(str(folder), section, 64, threads=1, version=version)


def test_fixed_lengths_follow_the_prompt_and_the_sample_whatever_the_order() -> None:
    sampling = SamplingSpec(9, num_generations=2, fixed_lengths=(1, 2, 3, 4, 9))
    assert [sampling.fixed_length(prompt, sample) for prompt in (2, 0) for sample in (0, 1)] == [9, 1, 1, 2]
    assert SamplingSpec(9).fixed_length(0, 0) is None


@pytest.mark.parametrize("lengths", [(), (0,), (3, 10)])
def test_fixed_lengths_that_do_not_fit_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="from 1 to max_completion_length=9"):
        SamplingSpec(9, fixed_lengths=lengths)


def test_seeds_are_the_same_in_every_process_and_differ_between_samples() -> None:
    assert sample_seed(0, 0, 0) == 1_445_694_884_619_442_965
    seeds = {
        sample_seed(run, prompt, sample) for run in range(5) for prompt in range(20) for sample in range(8)
    }
    assert len(seeds) == 800 and max(seeds) < 2**63


def test_empty_responses_and_broken_logprobs_are_named() -> None:
    prompts = make_prompts(3)
    requests = make_requests(prompts, 2, seed=0)
    good = Sample([5, 6], [-1.0, -2.0], [0, 0], finished=True)
    with pytest.raises(GenerationError, match="sample 1 of prompt 10: the response is empty"):
        check_samples(requests, [good, Sample([], [], [], finished=False)])
    broken = Sample([5, 6], [-1.0, float("nan")], [0, 0], finished=True)
    with pytest.raises(GenerationError, match=r"sample 0 of prompt 10: .* token 1 \(id 6\) is nan"):
        check_samples(requests, [broken, good])


def test_all_eos_ids_are_read_and_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert read_eos_ids(str(tmp_path)) == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert read_eos_ids(str(tmp_path)) == (7, 9)
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id is missing"):
        read_eos_ids(str(tmp_path))


@torch.no_grad()
def test_greedy_is_argmax_one_token_at_a_time_whatever_the_padding(
    folder: Path, model: PreTrainedModel
) -> None:
    prompts = make_prompts(2, 17, 6)
    rollouts = generator(folder).generate(prompts, SamplingSpec(12, temperature=0.0), seed=0)
    for row, prompt in enumerate(prompts.token_ids):
        ids = prompt.tolist()
        for token, logprob in zip(rollouts.responses[row], rollouts.logprobs[row], strict=True):
            logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert int(logprobs.argmax()) == token
            assert float(logprobs[token]) == pytest.approx(float(logprob), abs=1e-4)
            ids.append(int(token))


@torch.no_grad()
def test_sampled_logprobs_are_temperature_scaled(folder: Path, model: PreTrainedModel) -> None:
    sampling = SamplingSpec(12, temperature=0.7, num_generations=2)
    rollouts = generator(folder).generate(make_prompts(2, 17), sampling, seed=0)
    for prompt, sequence, logprobs in zip(
        rollouts.prompts, rollouts.sequences, rollouts.logprobs, strict=True
    ):
        ids = torch.tensor(sequence.tolist())
        scaled = (model(ids[None]).logits[0, :-1] / 0.7).log_softmax(-1)
        expected = scaled[torch.arange(len(ids) - 1), ids[1:]][len(prompt) - 1 :]
        np.testing.assert_allclose(logprobs, expected.numpy(), atol=1e-4)
    assert set(rollouts.versions.values.tolist()) == {4}


def test_samples_do_not_depend_on_the_batch(folder: Path) -> None:
    prompts, sampling = make_prompts(4, 15, 8), SamplingSpec(12, num_generations=2)
    whole = generator(folder).generate(prompts, sampling, seed=3)
    parts = generator(folder, max_num_seqs=2).generate(prompts.select([2, 0]), sampling, seed=3)
    for part, row in enumerate((4, 5, 0, 1)):
        assert parts.responses[part].tolist() == whole.responses[row].tolist()
    assert whole.responses[0].tolist() != whole.responses[1].tolist()


def test_sampling_follows_the_temperature_scaled_nucleus() -> None:
    """Frequencies over 20,000 rows against the hand-computed distribution, to five standard errors."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    count = 20_000
    sampling = SamplingSpec(1, temperature=2.0, top_p=0.7)
    sampler = _SeededSampler(range(count), sampling)
    chosen = sampler(torch.zeros(count, 1, dtype=torch.long), probabilities.log().repeat(count, 1)).argmax(-1)
    # sqrt of each probability, normalised: 0.382, 0.296, 0.209, 0.121; the nucleus of 0.7 holds the first
    # three.
    nucleus = probabilities[:3].sqrt() / probabilities[:3].sqrt().sum()
    assert int(chosen.max()) == 2
    for token, expected in enumerate(nucleus.tolist()):
        frequency = float((chosen == token).float().mean())
        assert abs(frequency - expected) < 5 * np.sqrt(expected * (1 - expected) / count)
    assert sampler.logprobs[0].exp().tolist() == pytest.approx(nucleus[chosen].tolist(), abs=1e-5)


def test_weights_of_unknown_version_and_too_long_prompts_are_refused(folder: Path) -> None:
    with pytest.raises(WeightSyncError, match="before the trainer published"):
        generator(folder, version=-1).generate(make_prompts(3), SamplingSpec(4), seed=0)
    with pytest.raises(GenerationError, match=r"prompt 10: 60 tokens and 5 of the response .* 64"):
        generator(folder).generate(make_prompts(60), SamplingSpec(5), seed=0)


def test_fixed_lengths_are_refused_and_not_ignored(folder: Path) -> None:
    with pytest.raises(GenerationError, match=r"engine\.backend=transformers: .* need vllm"):
        generator(folder).generate(make_prompts(3), SamplingSpec(4, fixed_lengths=(2,)), seed=0)
