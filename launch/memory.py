"""How much main memory an actor of each role takes, from the size of its model. Estimates: they decide
whether a placement is refused before anything starts, so they lean to the high side by little."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_ray.config.schema import EngineSection, ModelSection, TrainingSection
from rlhf_ray.models.loading import materialise

GIB = 1 << 30
PROCESS = int(0.8 * GIB)
"""An actor with torch, transformers and DeepSpeed imported."""
ENGINE_PROCESS = int(1.6 * GIB)


def num_parameters(model: ModelSection) -> int:
    """Parameters of the causal language model, from its configuration alone."""
    config = AutoConfig.from_pretrained(materialise(model), trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    skeleton.tie_weights()
    return sum(parameter.numel() for parameter in skeleton.parameters())


def trained_memory(parameters: int, training: TrainingSection, ranks: int) -> int:
    """Bytes a rank: float32 weights and gradients, two Adam moments, activations of a micro-batch.

    ZeRO divides over ranks: from stage 1 the moments (and DeepSpeed's flat copy of the weights), from stage 2
    the gradients, at stage 3 the weights.
    """
    stage = training.zero_stage
    weights = 4 * parameters / (ranks if stage == 3 else 1)
    gradients = 4 * parameters / (ranks if stage >= 2 else 1)
    optimizer = (8 if stage == 0 else 12) * parameters / (ranks if stage >= 1 else 1)
    activations = training.tokens_per_micro_batch * 0.4 * (1 << 20)
    return int(PROCESS + weights + gradients + optimizer + activations)


def frozen_memory(parameters: int, num_models: int = 1) -> int:
    return int(PROCESS + num_models * 4 * parameters + 0.3 * GIB)


def engine_memory(parameters: int, engine: EngineSection) -> int:
    bytes_per_weight = 2 if engine.dtype == "bfloat16" else 4
    return int(ENGINE_PROCESS + 2 * bytes_per_weight * parameters + engine.cpu_kv_cache_gib * GIB)
