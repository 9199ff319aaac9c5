"""vLLM itself, in processes of its own, against transformers and a trainer in this one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

pytest.importorskip("vllm")

from rlhf_ray.config.schema import EngineSection
from rlhf_ray.engines.generation import read_eos_ids
from rlhf_ray.engines.hf_generator import HFGenerator
from rlhf_ray.engines.vllm_generator import VLLMGenerator
from rlhf_ray.errors import GenerationError, WeightSyncError
from rlhf_ray.types import Prompts, Ragged, Rollouts, SamplingSpec
from rlhf_ray.weights.source import ModuleWeightSource
from rlhf_ray.weights.sync import MultiEngineClient, TransferSpec, WeightPublisher
from rlhf_ray.weights.verify import Probe, ProbeHistory, compare_probe
from tests.engine_process import EngineProcess, free_port
from tests.tiny import VOCABULARY, tiny_model_folder

pytestmark = pytest.mark.actors

SECTION = EngineSection(dtype="float32", cpu_kv_cache_gib=0.05)
MAX_MODEL_LEN = 256
PROBE = Ragged.from_rows([np.arange(3, 40), np.arange(60, 90)], np.int32)


def make_prompts(*lengths: int, first_id: int = 10) -> Prompts:
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, VOCABULARY, size=length) for length in lengths]
    count = len(lengths)
    return Prompts(
        ids=np.arange(first_id, first_id + count),
        messages=tuple(({"role": "user", "content": str(row)},) for row in range(count)),
        token_ids=Ragged.from_rows(rows, np.int32),
        columns=tuple({"row": row} for row in range(count)),
    )


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def perturb(model: PreTrainedModel, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += scale * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def trainer_logprobs(model: PreTrainedModel, rows: Ragged, temperature: float = 1.0) -> Ragged:
    scored = []
    for row in rows:
        ids = torch.tensor(row.tolist())
        logprobs = (model(ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
        scored.append(logprobs[torch.arange(len(ids) - 1), ids[1:]].numpy())
    return Ragged.from_rows(scored, np.float32)


def assert_logprobs_are_the_trainers(rollouts: Rollouts, model: PreTrainedModel, temperature: float) -> None:
    """The sampler's own log-probs against a forward pass over prompt and response."""
    whole = trainer_logprobs(model, rollouts.sequences, temperature)
    for row, prompt in enumerate(rollouts.prompts):
        np.testing.assert_allclose(rollouts.logprobs[row], whole[row][len(prompt) - 1 :], atol=1e-4)


def connect(source: ModuleWeightSource, *engines: EngineProcess) -> WeightPublisher:
    spec = TransferSpec("gloo", len(engines), "127.0.0.1", free_port(), timeout=60.0)
    return WeightPublisher(source, spec, rank=0, client=MultiEngineClient(engines, tensor_parallel_size=1))


def probe(engine: EngineProcess, model: PreTrainedModel) -> Probe:
    return Probe(engine.call("token_logprobs", PROBE).result(), trainer_logprobs(model, PROBE))


def skip_the_heads(_engine: VLLMGenerator) -> None:
    """In the engine's process: what a weight transfer without the care for tied heads does."""
    from rlhf_ray.weights import gloo_worker

    gloo_worker.repack_heads = lambda _model: None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[EngineProcess]:
    """Holds the folder's weights, as version 3. Tests of the weight sync have engines of their own."""
    process = EngineProcess(VLLMGenerator, str(folder), SECTION, MAX_MODEL_LEN, threads=1, seed=0, version=3)
    yield process.wait_until_built()
    process.stop()


@pytest.fixture(scope="module")
def reference(folder: Path) -> HFGenerator:
    return HFGenerator(str(folder), SECTION, MAX_MODEL_LEN, threads=1, version=3)


def generate(engine: EngineProcess, prompts: Prompts, sampling: SamplingSpec, seed: int = 0) -> Rollouts:
    rollouts = engine.call("generate", prompts, sampling, seed).result()
    assert isinstance(rollouts, Rollouts)
    return rollouts


def test_greedy_tokens_are_those_of_transformers(engine: EngineProcess, reference: HFGenerator) -> None:
    prompts = make_prompts(3, 9, 60, 5)
    sampling = SamplingSpec(max_completion_length=24, temperature=0.0)
    ours, theirs = generate(engine, prompts, sampling), reference.generate(prompts, sampling, seed=0)
    assert ours.responses.values.tolist() == theirs.responses.values.tolist()
    assert ours.finished.tolist() == theirs.finished.tolist()
    np.testing.assert_allclose(ours.logprobs.values, theirs.logprobs.values, atol=1e-4)


def test_sampled_logprobs_are_a_forward_pass_under_the_temperature(
    engine: EngineProcess, folder: Path
) -> None:
    sampling = SamplingSpec(max_completion_length=20, temperature=0.7, num_generations=3)
    rollouts = generate(engine, make_prompts(3, 60), sampling)
    assert_logprobs_are_the_trainers(rollouts, load(folder), 0.7)
    assert rollouts.prompt_ids.tolist() == [10, 10, 10, 11, 11, 11]
    assert rollouts.sample_ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert [column["row"] for column in rollouts.columns] == [0, 0, 0, 1, 1, 1]
    assert rollouts.prompts.lengths.tolist() == [3, 3, 3, 60, 60, 60]
    assert set(rollouts.versions.values.tolist()) == {3}


def test_a_sample_depends_on_its_seed_prompt_and_number_alone(engine: EngineProcess) -> None:
    prompts = make_prompts(4, 6, 8)
    sampling = SamplingSpec(max_completion_length=16, num_generations=2)
    whole = generate(engine, prompts, sampling, seed=5)
    turned = generate(engine, prompts.select([2, 0]), sampling, seed=5)
    assert [turned.responses[i].tolist() for i in range(4)] == [
        whole.responses[i].tolist() for i in (4, 5, 0, 1)
    ]
    assert whole.responses[0].tolist() != whole.responses[1].tolist()
    assert generate(engine, prompts, sampling, seed=6).responses[0].tolist() != whole.responses[0].tolist()


def test_answers_of_fixed_lengths_go_on_over_an_eos(engine: EngineProcess, folder: Path) -> None:
    sampling = SamplingSpec(150, temperature=2.0, num_generations=16, fixed_lengths=(150, 1, 7))
    rollouts = generate(engine, make_prompts(4, 6, first_id=0), sampling)
    assert rollouts.responses.lengths.tolist() == [150, 1, 7] * 10 + [150, 1]
    assert not rollouts.finished.any()
    eos = read_eos_ids(str(folder))
    assert any(np.isin(response[:-1], eos).any() for response in rollouts.responses)
    assert_logprobs_are_the_trainers(rollouts, load(folder), 2.0)


def test_token_logprobs_are_those_of_a_forward_pass(engine: EngineProcess, folder: Path) -> None:
    scored = engine.call("token_logprobs", PROBE).result()
    assert scored.lengths.tolist() == [36, 29]
    np.testing.assert_allclose(scored.values, trainer_logprobs(load(folder), PROBE).values, atol=1e-4)


def test_a_prompt_that_does_not_fit_is_an_error(engine: EngineProcess) -> None:
    with pytest.raises(GenerationError, match=r"prompt 10: 250 tokens and 7 of the response .* 256"):
        generate(engine, make_prompts(250), SamplingSpec(max_completion_length=7))


def test_every_eos_of_the_generation_config_ends_a_response(tmp_path: Path) -> None:
    """Half of the vocabulary is EOS, so responses end soon, and not before the least length."""
    folder = tiny_model_folder(tmp_path)
    eos = list(range(2, VOCABULARY, 2))
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": eos}))
    prompts = make_prompts(3, 5, 7)
    sampling = SamplingSpec(max_completion_length=30, num_generations=4, min_completion_length=2)
    process = EngineProcess(
        VLLMGenerator, str(folder), SECTION, MAX_MODEL_LEN, threads=1, seed=0, version=0
    ).wait_until_built()
    theirs = HFGenerator(str(folder), SECTION, MAX_MODEL_LEN, threads=1, version=0)
    for rollouts in (generate(process, prompts, sampling), theirs.generate(prompts, sampling, seed=0)):
        assert rollouts.finished.all()
        last = [response[-1] for response in rollouts.responses]
        assert len(set(last)) > 1 and set(last) <= set(eos)
        assert not any(np.isin(response[:-1], eos).any() for response in rollouts.responses)
        assert rollouts.responses.lengths.min() >= 3
    process.stop()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_publication_reaches_vllm_and_transformers_engines(tmp_path: Path, tied: bool) -> None:
    folder = tiny_model_folder(tmp_path, tied=tied)
    engines = [
        EngineProcess(VLLMGenerator, str(folder), SECTION, MAX_MODEL_LEN, threads=1, seed=0),
        EngineProcess(HFGenerator, str(folder), SECTION, MAX_MODEL_LEN, threads=1),
    ]
    model = load(folder)
    prompts, sampling = make_prompts(200, 5), SamplingSpec(max_completion_length=20, temperature=0.7)
    for process in engines:
        process.wait_until_built()
        with pytest.raises(WeightSyncError, match="before the trainer published"):
            generate(process, prompts, sampling)
    publisher = connect(ModuleWeightSource(model, torch.float32, zero_stage=0), *engines)
    histories = [ProbeHistory(tolerance=0.06) for _ in engines]
    for version in range(3):
        if version:
            perturb(model, 0.05, seed=version)
        publisher.publish(version)
        for process, history in zip(engines, histories, strict=True):
            current = probe(process, model)
            report = history.check(current)
            assert report.max < 1e-4
            if version:
                assert report.moved > 0.1 and report.followed == pytest.approx(1.0, abs=1e-3)
            # The same long prompt each time: attention to cached keys of earlier weights would show here.
            rollouts = generate(process, prompts, sampling)
            assert_logprobs_are_the_trainers(rollouts, model, 0.7)
            assert set(rollouts.versions.values.tolist()) == {version}
    publisher.close()
    for process in engines:
        process.stop()


def test_verification_catches_a_stale_head_and_stale_weights(folder: Path) -> None:
    process = EngineProcess(
        VLLMGenerator, str(folder), SECTION, MAX_MODEL_LEN, threads=1, seed=0
    ).wait_until_built()
    model, old = load(folder), load(folder)
    source = ModuleWeightSource(model, torch.float32, zero_stage=0)
    connect(source, process).publish(0)
    first = probe(process, model)
    compare_probe(first, None, tolerance=0.06)

    # Stale weights, by a step far below the tolerance: a publication that sends what it sent before.
    perturb(model, 1e-3, seed=1)
    connect(ModuleWeightSource(old, torch.float32, zero_stage=0), process).publish(1)
    stale = probe(process, model)
    assert np.abs(stale.difference).mean() < 0.06
    with pytest.raises(WeightSyncError, match="earlier weights"):
        compare_probe(stale, first, tolerance=0.06)
    connect(source, process).publish(2)
    assert compare_probe(probe(process, model), first, 0.06).followed == pytest.approx(1.0, abs=0.01)

    # Only the tied head is stale, by a large step and by a small one.
    process.call(skip_the_heads).result()
    second = probe(process, model)
    perturb(model, 1e-3, seed=2)
    connect(source, process).publish(3)
    assert np.abs(probe(process, model).difference).max() > 1e-3
    perturb(model, 0.05, seed=3)
    connect(source, process).publish(4)
    with pytest.raises(WeightSyncError, match="tied output head"):
        compare_probe(probe(process, model), second, tolerance=0.06)
    process.stop()


def test_layers_that_are_not_trained_are_sent_once(folder: Path) -> None:
    engines = [
        EngineProcess(VLLMGenerator, str(folder), SECTION, MAX_MODEL_LEN, threads=1, seed=0),
        EngineProcess(HFGenerator, str(folder), SECTION, MAX_MODEL_LEN, threads=1),
    ]
    model = load(folder)
    perturb(model, 0.05, seed=1)  # so that what is sent once is not what the engines read from the folder
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "model.layers.1.self_attn.k_proj.weight")
    source = ModuleWeightSource(model, torch.float32, zero_stage=0)
    publisher = connect(source, *(process.wait_until_built() for process in engines))
    publisher.publish(0)
    source.leave_out_frozen()
    assert all(name.startswith("model.layers.1.") for names in source.groups() for name in names)
    for version in (1, 2):
        with torch.no_grad():
            model.get_parameter("model.layers.1.self_attn.k_proj.weight").mul_(1.5)
        publisher.publish(version)
        for process in engines:
            assert np.abs(probe(process, model).difference).max() < 1e-4
    publisher.close()
    for process in engines:
        process.stop()


def test_parameters_without_weights_are_named(folder: Path) -> None:
    class Forgetful(ModuleWeightSource):
        def __init__(self, model: PreTrainedModel) -> None:
            super().__init__(model, torch.float32, zero_stage=0)
            del self._weights["model.layers.1.mlp.down_proj.weight"]

    process = EngineProcess(
        VLLMGenerator, str(folder), SECTION, MAX_MODEL_LEN, threads=1, seed=0
    ).wait_until_built()
    with pytest.raises(WeightSyncError, match=r"1 of the engine's 14 .*: model\.layers\.1\.mlp\.down_proj"):
        connect(Forgetful(load(folder)), process).publish(0)
    with pytest.raises(WeightSyncError, match="earlier weight update of this engine failed"):
        process.call("start_weight_update").result()
    process.stop()
