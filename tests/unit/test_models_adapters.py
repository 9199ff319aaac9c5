"""Adapters in a model: against the model without them, and against peft's own wrapper and merging."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from rlhf_ray.config.schema import LoraSection, ModelSection
from rlhf_ray.errors import ConfigError, WeightSyncError
from rlhf_ray.models.adapters import adapters_off, add_adapter, checkpoint_weights
from rlhf_ray.models.batching import TokenBatch, collate
from rlhf_ray.models.heads import PolicyModel, ScalarModel
from rlhf_ray.models.loading import load_policy_model, load_scalar_model
from rlhf_ray.types import Ragged
from rlhf_ray.weights.source import ModuleWeightSource
from rlhf_ray.weights.verify import Probe, ProbeHistory
from tests.fakes import HandFedGenerator
from tests.local_roles import CPU
from tests.tiny import tiny_model_folder

LORA = LoraSection(rank=4, alpha=8)
ROWS = Ragged.from_rows([np.arange(3, 30), np.arange(90, 101), np.arange(40, 80)], np.int32)
PER_LAYER = (64 + 128) + 2 * (64 + 64) + (128 + 64) + 3 * (64 + 128)
"""Inputs plus outputs of q, of k and v, of o, and of gate, up and down, in a layer of the tiny model."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


def policy(model: ModelSection, lora: LoraSection | None = LORA, seed: int = 0) -> PolicyModel:
    module = PolicyModel(load_policy_model(model), token_budget=512)
    if lora is not None:
        add_adapter(module, lora, seed)
    return module


def critic(model: ModelSection, lora: LoraSection | None = LORA) -> ScalarModel:
    module = ScalarModel(load_scalar_model(model, seed=0))
    if lora is not None:
        add_adapter(module, lora, seed=0)
    return module


def low_rank(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if ".lora_" in name)


@torch.no_grad()
def move(module: PolicyModel, scale: float, seed: int = 1) -> None:
    """As training does: all adapters, and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in low_rank(module):
        parameter += scale * torch.randn(parameter.shape, generator=generator)


def rectangle() -> TokenBatch:
    return collate(ROWS, np.ones(len(ROWS.values), dtype=bool), layout="padded", device=CPU)


@torch.no_grad()
def values(module: PolicyModel | ScalarModel) -> torch.Tensor:
    out = module.eval()(rectangle())
    return out if isinstance(out, torch.Tensor) else out.logprobs


def following(module: PolicyModel) -> Ragged:
    """Log-probs of all tokens after each row's first, as an engine gives them."""
    is_source = np.ones(len(ROWS.values), dtype=bool)
    is_source[ROWS.offsets[1:] - 1] = False
    with torch.no_grad():
        logprobs = module.eval()(collate(ROWS, is_source, layout="padded", device=CPU)).logprobs
    return Ragged.from_lengths(logprobs.numpy(), ROWS.lengths - 1)


@pytest.mark.parametrize("build", [policy, critic])
@pytest.mark.parametrize("mixed", [False, True])
def test_new_adapters_change_nothing_to_the_last_bit(model: ModelSection, build, mixed: bool) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16) if mixed else nullcontext():
        assert torch.equal(values(build(model)), values(build(model, None)))


def test_only_adapters_and_a_scalar_models_head_are_trained(model: ModelSection) -> None:
    def trained(module: torch.nn.Module) -> dict[str, int]:
        return {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}

    of_policy, of_critic = trained(policy(model)), trained(critic(model))
    assert all(".lora_" in name for name in of_policy)
    assert sum(of_policy.values()) == LORA.rank * 2 * PER_LAYER
    assert of_critic == {**of_policy, "model.score.weight": 64}


def test_gradients_reach_adapters_and_nothing_else(model: ModelSection) -> None:
    module = critic(model)
    with torch.no_grad():
        for _, parameter in low_rank(module):
            parameter += 0.1
    module(rectangle()).sum().backward()
    for name, parameter in module.named_parameters():
        wanted = ".lora_" in name or name == "model.score.weight"
        assert (parameter.grad is not None and bool(parameter.grad.any())) is wanted, name


def test_adapters_depend_on_the_seed_alone(model: ModelSection) -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in low_rank(policy(model, seed=seed))}

    torch.manual_seed(1)
    one = drawn(seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    module = PolicyModel(load_policy_model(model), token_budget=512)
    torch.set_rng_state(state)
    add_adapter(module, LORA, seed=5)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
    for name, parameter in low_rank(module):
        assert torch.equal(parameter, one[name]), name
        assert bool(parameter.any()) is ("lora_A" in name)
    other = drawn(seed=6)
    assert not any(torch.equal(other[name], one[name]) for name in one if "lora_A" in name)


def peft_twin(module: PolicyModel, base: PreTrainedModel) -> PeftModel:
    """peft's own wrapper with the same adapters."""
    config = LoraConfig(
        r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    twin = get_peft_model(base, config)
    own = dict(low_rank(module.model))
    theirs = dict(low_rank(twin))
    assert {name.removeprefix("base_model.model.") for name in theirs} == own.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(own[name.removeprefix("base_model.model.")])
    return twin


@pytest.mark.parametrize("tied", [True, False])
def test_the_stream_is_what_peft_merges_and_the_model_stays_as_it_is(tmp_path: Path, tied: bool) -> None:
    folder = tiny_model_folder(tmp_path, tied=tied)
    module = policy(ModelSection(path=str(folder)))
    move(module, 0.1)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    source = ModuleWeightSource(module.model, torch.float32, zero_stage=0)
    for _ in range(2):
        sent = dict(source)
    merged = peft_twin(module, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    expected = dict(merged.merge_and_unload().named_parameters())
    assert list(sent) == list(expected)
    assert list(sent) == [spec.name for spec in source.metadata()]
    original = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    for name, tensor in sent.items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
        is_adapted = name.startswith("model.layers.") and "norm" not in name
        assert torch.equal(tensor, original[name]) is not is_adapted, name
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_matrices_are_merged_before_they_are_rounded(model: ModelSection) -> None:
    """Adding in bfloat16 would lose what is smaller than half a unit in the last place of the matrix."""
    module = policy(model)
    move(module, 0.01)
    exact = dict(ModuleWeightSource(module.model, torch.float32, zero_stage=0))
    for name, tensor in ModuleWeightSource(module.model, torch.bfloat16, zero_stage=0):
        assert torch.equal(tensor, exact[name].bfloat16()), name


def test_matrices_that_are_stored_transposed_and_have_a_bias() -> None:
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=48, n_layer=2, n_head=4, resid_pdrop=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base, plain = GPT2LMHeadModel(config).eval(), GPT2LMHeadModel(config).eval()
    names = [name for name, _ in base.named_parameters()]
    module = PolicyModel(base, token_budget=512)
    add_adapter(module, LORA, seed=0)
    move(module, 0.1)
    sent = dict(ModuleWeightSource(module.model, torch.float32, zero_stage=0))
    assert list(sent) == names
    plain.load_state_dict(sent, strict=False)
    assert torch.allclose(values(module), values(PolicyModel(plain, token_budget=512)), atol=1e-5)


def test_target_modules_name_layers_by_the_end_of_their_path(model: ModelSection) -> None:
    lora = LORA.model_copy(update={"target_modules": ("v_proj", "0.mlp.up_proj")})
    adapted = {name.partition(".lora_")[0] for name, _ in low_rank(policy(model, lora).model)}
    layer = "model.layers"
    assert adapted == {
        f"{layer}.0.self_attn.v_proj",
        f"{layer}.1.self_attn.v_proj",
        f"{layer}.0.mlp.up_proj",
    }


@pytest.mark.parametrize("name", ["proj", "lm_head", "embed_tokens", "v_proj "])
def test_a_target_that_is_no_layer(model: ModelSection, name: str) -> None:
    lora = LORA.model_copy(update={"target_modules": ("v_proj", name)})
    with pytest.raises(ConfigError) as caught:
        policy(model, lora)
    assert str(caught.value) == (
        f"training.lora.target_modules: no linear layer is called {name}; use all-linear, or q_proj, k_proj, "
        "v_proj, o_proj, gate_proj, up_proj, down_proj"
    )


def test_without_its_adapters_it_is_the_model_it_was(model: ModelSection) -> None:
    module = policy(model)
    start = values(module)
    move(module, 0.1)
    moved = values(module)
    with adapters_off(module.model):
        assert torch.equal(values(module), start)
    assert torch.equal(values(module), moved) and not torch.equal(moved, start)
    assert all(parameter.requires_grad for _, parameter in low_rank(module))


def base_only(module: PolicyModel) -> list[tuple[str, torch.Tensor]]:
    """The mistake: the frozen matrices under the right names, and the adapters left behind."""
    return [(name, weight.parameter.detach()) for name, weight in checkpoint_weights(module.model).items()]


@pytest.mark.parametrize(
    ("scale", "said"), [(0.05, "more than sync.tolerance"), (0.004, "the engine still samples with earlier")]
)
def test_a_sync_that_leaves_the_adapters_behind_is_caught(
    model: ModelSection, scale: float, said: str
) -> None:
    """Where the adapters moved far, and where the movement hides inside the tolerance."""
    module, engine = policy(model), HandFedGenerator(Path(model.path))
    source = ModuleWeightSource(module.model, torch.float32, zero_stage=0)
    histories = [ProbeHistory(tolerance=0.06), ProbeHistory(tolerance=0.06)]
    engine.load_weights(list(source), version=0)
    for history in histories:
        history.check(Probe(engine.token_logprobs(ROWS), following(module)))
    move(module, scale)
    engine.load_weights(base_only(module), version=1)
    with pytest.raises(WeightSyncError, match=said):
        histories[0].check(Probe(engine.token_logprobs(ROWS), following(module)))
    engine.load_weights(list(source), version=2)
    report = histories[1].check(Probe(engine.token_logprobs(ROWS), following(module)))
    assert report.mean < 1e-5
    assert report.followed == pytest.approx(1.0, abs=1e-2)
