"""Shapes of models, and the bytes that the roles keep of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import AutoModelForCausalLM

from launch.memory import model_size
from rlhf_ray.config.schema import EngineSection, LoraSection, ModelSection, TrainingSection
from rlhf_ray.errors import ConfigError, ModelError
from rlhf_ray.planning import memory
from rlhf_ray.planning.hardware import GIB, cpu, gpu
from rlhf_ray.planning.measured import MEASURED, MODELS, WITHIN, Case, accuracy
from rlhf_ray.planning.memory import BFLOAT16, FLOAT32
from rlhf_ray.planning.shapes import ModelShape, known_shape, shape_of, shape_of_config
from tests.tiny import tiny_model_folder

TOY = ModelShape(2, 8, 16, heads=4, kv_heads=2, head_dim=2, vocabulary=100, tied=True)
LORA = LoraSection(rank=2)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen2.5-32B-Instruct", 32_763_876_352),
        ("Qwen/Qwen2.5-72B", 72_706_203_648),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("somewhere/Llama-3.3-70B-Instruct", 70_553_706_496),
        ("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616),
        ("embedded:smollm2-135m-instruct", 134_515_008),
    ],
)
def test_known_models_have_as_many_parameters_as_published(name: str, parameters: int) -> None:
    assert shape_of(name).parameters == parameters


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_is_counted_as_it_is(tied: bool, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, tied=tied)
    shape, model = shape_of(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    real = model_size(ModelSection(path=str(folder)))
    assert shape.parameters == real.parameters and shape.kv_bytes(2) == real.kv_bytes(2)
    for lora in (LORA, LoraSection(rank=3, target_modules=("v_proj", "mlp.up_proj", "o_proj"))):
        ours = shape.trained(lora) if lora is LORA else None
        assert ours is None or ours == real.trained(lora)


def test_what_cannot_be_told_is_said() -> None:
    assert known_shape("nobody/no-such-model") is None
    with pytest.raises(ModelError, match="its shape is not known here"):
        shape_of("nobody/no-such-model")
    with pytest.raises(ModelError, match="not mixtral"):
        shape_of_config({"model_type": "mixtral"}, "m")
    with pytest.raises(ConfigError, match="--gpu K80: no figures for it; there are A10"):
        gpu("K80")


@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (8, 1), (8, 4)])
def test_model_states_are_those_of_deepspeeds_estimators(gpus: int, nodes: int) -> None:
    """With its precision, bfloat16 weights. At stage 3 it leaves the bfloat16 gradients out, and counts the
    largest layer, gathered, at 4 bytes."""
    parameters, largest, ranks = 7_000_000_000, 500_000_000, gpus * nodes
    _, whole = estimate_zero2_model_states_mem_needs(parameters, gpus, nodes, cpu_offload=False)
    assert sum(BFLOAT16.per_rank(parameters, parameters, ranks, 2).values()) == pytest.approx(whole)
    _, offloaded = estimate_zero2_model_states_mem_needs(parameters, gpus, nodes, cpu_offload=True)
    assert BFLOAT16.per_rank(parameters, parameters, ranks, 2)["weights"] == offloaded
    _, parts, _ = estimate_zero3_model_states_mem_needs(
        parameters, largest, gpus, nodes, cpu_offload=False, cpu_offload_params=False
    )
    ours = sum(BFLOAT16.per_rank(parameters, parameters, ranks, 3).values())
    assert ours - 2 * parameters / ranks == pytest.approx(parts - 4 * largest)


def test_states_by_hand() -> None:
    assert FLOAT32.per_rank(100, 100, 4, 0) == {"weights": 400, "gradients": 400, "optimizer": 800}
    assert FLOAT32.per_rank(100, 100, 4, 1) == {"weights": 400, "gradients": 400, "optimizer": 300}
    assert FLOAT32.per_rank(100, 100, 4, 2) == {"weights": 400, "gradients": 100, "optimizer": 300}
    assert FLOAT32.per_rank(100, 20, 4, 3) == {"weights": 100, "gradients": 20, "optimizer": 60}


def test_activations_by_hand() -> None:
    # 26 x 8 of the residual stream, 8 x 8 of attention, 8 x 16 of the MLP.
    layer = 26 * 8 + 8 * 8 + 8 * 16
    assert memory.activations(TOY, TrainingSection(), tokens=10) == 10 * 2 * layer
    checkpoints = TrainingSection(gradient_checkpointing=True)
    assert memory.activations(TOY, checkpoints, tokens=10) == 10 * (2 * 4 * 8 + layer)


def trained(training: TrainingSection, ranks: int = 1, longest: int = 0) -> memory.RoleMemory:
    return memory.trained("policy", TOY, training, ranks=ranks, longest=longest, device=cpu(1, 0))


def test_a_row_longer_than_the_budget_is_a_micro_batch() -> None:
    short = TrainingSection(tokens_per_micro_batch=100)
    assert trained(short, longest=200).peak == trained(TrainingSection(tokens_per_micro_batch=200)).peak
    alone, shared = (
        trained(TrainingSection(tokens_per_micro_batch=100, sequence_parallel_size=size), ranks=2)
        for size in (1, 2)
    )
    assert shared.of_kind("activations") < alone.of_kind("activations")


def test_offloaded_states_are_in_main_memory() -> None:
    states = TrainingSection(zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu")
    offloaded, kept = trained(states), trained(TrainingSection(zero_stage=3))
    assert kept.host == 0 and kept.of_kind("optimizer") == 12 * TOY.parameters
    assert offloaded.of_kind("optimizer") == 0
    assert offloaded.host == (12 + 4 + 4) * TOY.parameters


def test_an_engine_takes_its_share_and_fills_it() -> None:
    device, shape = gpu("H100"), shape_of("meta-llama/Llama-3.1-8B")
    section = EngineSection(gpu_memory_utilization=0.5)
    found = memory.engine("engine", shape, section, longest=4096, device=device)
    assert found.shortfall == 0
    share = sum(found.of_kind(kind) for kind in memory.KINDS if kind != "process")
    assert share == pytest.approx(0.5 * device.memory)
    # 70B do not fit on one; on eight a worker has an eighth of the weights.
    large = shape_of("meta-llama/Llama-3.1-70B")
    assert memory.engine("engine", large, section, longest=4096, device=device).shortfall > 90 * GIB
    eight = section.model_copy(update={"tensor_parallel_size": 8})
    assert memory.engine("engine", large, eight, longest=4096, device=device).shortfall == 0


def test_who_waits_is_not_on_the_device() -> None:
    device, section = gpu("H100"), EngineSection()
    turns = memory.engine("engine", TOY, section, longest=10, device=device).taking_turns()
    process = memory.ON_GPU.engine
    assert turns.during("policy") == process
    # For new weights it wakes up without its cache.
    assert turns.during("sync") == process + 2 * TOY.parameters
    assert turns.during("generate") == pytest.approx(process + 0.5 * device.memory)
    policy = trained(TrainingSection()).taking_turns()
    assert policy.during("generate") == policy.during("critic") == memory.ON_CPU.trainer
    assert policy.host == (4 + 12) * TOY.parameters


@pytest.mark.parametrize(("case", "gib"), MEASURED, ids=[case.name for case, _ in MEASURED])
def test_plans_are_near_what_was_measured(case: Case, gib: float) -> None:
    assert gib * GIB == pytest.approx(case.planned, rel=WITHIN)


def test_the_measured_models_are_those_of_the_benchmark() -> None:
    assert MODELS["large"].parameters == shape_of("embedded:smollm2-135m-instruct").parameters
    assert "20 settings of models up to 135M" in accuracy()
