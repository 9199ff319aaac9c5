"""The trainer's weights as a stream: checkpoint names, wire type, and every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_ray.engines.deepspeed_engine import World, init_world
from rlhf_ray.weights.broadcast import TensorSpec
from rlhf_ray.weights.source import ModuleWeightSource, layer_groups
from tests.ranks import run_ranks
from tests.tiny import tiny_model_folder

LEARNING_RATE = 0.01


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_values_are_those_of_the_checkpoint(tmp_path: Path, tied: bool) -> None:
    folder = tiny_model_folder(tmp_path, tied=tied)
    checkpoint = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = ModuleWeightSource(model, torch.float32, zero_stage=0)
    sent = dict(source)
    assert ("lm_head.weight" in sent) is not tied
    assert sent.keys() == checkpoint.keys()
    assert all(torch.equal(sent[name], checkpoint[name]) for name in checkpoint)


def test_metadata_agrees_with_iteration_and_prefix_and_type_are_applied(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(tmp_path), dtype=torch.float32)
    wrapped = torch.nn.ModuleDict({"policy": model, "value_head": torch.nn.Linear(64, 1)})
    source = ModuleWeightSource(wrapped, torch.bfloat16, zero_stage=1, prefix="policy.")
    pairs = list(source)
    assert source.metadata() == [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in pairs]
    own = dict(model.named_parameters())
    assert [name for name, _ in pairs] == list(own)
    assert all(torch.equal(tensor, own[name].bfloat16()) for name, tensor in pairs)


def test_a_pass_gives_the_weights_of_its_own_time(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(tmp_path), dtype=torch.float32)
    source = ModuleWeightSource(model, torch.float32, zero_stage=0)
    before = dict(source)["model.norm.weight"].clone()
    with torch.no_grad():
        model.model.norm.weight += 1
    assert torch.equal(dict(source)["model.norm.weight"], before + 1)


def test_frozen_layers_are_left_out_on_request(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(tmp_path), dtype=torch.float32)
    source = ModuleWeightSource(model, torch.float32, zero_stage=0)
    everything = source.groups()
    source.leave_out_frozen()
    assert source.groups() == everything, "all of it is trained"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "model.layers.1.mlp.up_proj.weight")
    source.leave_out_frozen()
    layer = [name for names in everything for name in names if name.startswith("model.layers.1.")]
    assert source.groups() == [layer]
    assert [spec.name for spec in source.metadata()] == layer == [name for name, _ in source]


def test_groups_are_layers_by_the_outermost_number() -> None:
    names = [
        "embed.weight",
        "layers.0.q.weight",
        "layers.0.experts.1.up.weight",
        "layers.1.q.weight",
        "layers.10.q.weight",
        "norm.weight",
        "lm_head.weight",
    ]
    assert layer_groups(names) == [names[:1], names[1:3], names[3:4], names[4:5], names[5:]]


def zero_rank(world: World, folder: str, out: str) -> None:
    """One rank: for ZeRO 1 and 3, one optimizer step, then all weights by the source; rank 0 saves them."""
    init_world(world)
    import deepspeed

    for stage in (1, 3):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": 0.0,
            },
        )
        ids = torch.arange(3, 23)[None]
        engine.backward(engine(ids, labels=ids).loss)
        engine.step()
        source = ModuleWeightSource(engine.module, torch.float32, stage)
        largest = max(spec.num_bytes for spec in source.metadata())
        sent = {}
        for names, tensors in source.iter_groups():
            whole = sum(p.numel() * 4 for p in engine.module.parameters())
            assert stage < 3 or whole < largest, "the parameters are partitioned again when a group is given"
            sent.update(zip(names, tensors, strict=True))
        assert source.metadata() == [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in sent.items()]
        if world.rank == 0:
            torch.save({name: tensor.clone() for name, tensor in sent.items()}, f"{out}/zero{stage}.pt")
        engine.destroy()


def test_two_ranks_at_zero_1_and_3_give_the_full_updated_weights(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model")
    run_ranks(zero_rank, 2, tmp_path, str(folder), str(tmp_path))

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 23)[None]
    model(ids, labels=ids).loss.backward()
    expected = {name: p.detach() - LEARNING_RATE * p.grad for name, p in model.named_parameters()}
    for stage in (1, 3):
        sent = torch.load(tmp_path / f"zero{stage}.pt", weights_only=True)
        assert list(sent) == list(expected)
        for name, tensor in expected.items():
            assert torch.allclose(sent[name], tensor, atol=1e-6), (stage, name)
    moved = expected["model.norm.weight"] - 1
    assert moved.abs().max() > 1e-4
