"""How much main memory an actor of each role takes, from the size of its model. Estimates, set by what the
quickstart's actors were seen to take: they decide whether a placement is refused before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.config.schema import EngineSection, ModelSection, TrainingSection
from rlhf_ray.models.adapters import adapted_layers, linear_layers
from rlhf_ray.models.heads import CHUNK_TOKENS
from rlhf_ray.models.loading import model_config

GIB = 1 << 30
PROCESS = int(0.5 * GIB)
"""An actor with torch and transformers imported."""
ENGINE_PROCESS = GIB
ACTIVATION_BYTES = 50
"""Kept for the backward pass, a token, a layer and a unit of width: bfloat16 inputs of the matrix products,
float32 residual stream. With gradient checkpointing only the layer's own input is kept: 4."""


@dataclass(frozen=True)
class ModelSize:
    """Fields: width: of the hidden states. vocabulary: of the output head. linear: name of a layer that can
    have an adapter -> its inputs plus outputs."""

    parameters: int
    layers: int
    width: int
    vocabulary: int
    linear: dict[str, int]

    def trained(self, training: TrainingSection) -> int:
        """Parameters that have a gradient; the head of a model that scores is left out, being small."""
        if training.lora is None:
            return self.parameters
        adapted = adapted_layers(self.linear, training.lora)
        return training.lora.rank * sum(self.linear[name] for name in adapted)


def model_size(model: ModelSection) -> ModelSize:
    """Size of the causal language model, from its configuration alone."""
    config = model_config(model)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    skeleton.tie_weights()
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    text = config.get_text_config()
    return ModelSize(
        parameters, text.num_hidden_layers, text.hidden_size, text.vocab_size, linear_layers(skeleton)
    )


def trained_memory(size: ModelSize, training: TrainingSection, ranks: int) -> int:
    """Bytes a rank: float32 weights, a bfloat16 copy of them for autocast, gradients and two Adam moments of
    those that are trained, activations of a micro-batch, logits of a chunk and of its gradient.

    ZeRO divides over ranks: from stage 1 the moments (and DeepSpeed's flat copy of the weights), from stage 2
    the gradients, at stage 3 the weights.
    """
    stage = training.zero_stage
    trained = size.trained(training)
    weights = 6 * size.parameters / (ranks if stage == 3 else 1)
    gradients = 4 * trained / (ranks if stage >= 2 else 1)
    optimizer = (8 if stage == 0 else 12) * trained / (ranks if stage >= 1 else 1)
    per_unit = 4 if training.gradient_checkpointing else ACTIVATION_BYTES
    activations = training.tokens_per_micro_batch * size.layers * size.width * per_unit
    logits = 4 * 4 * min(CHUNK_TOKENS, training.tokens_per_micro_batch) * size.vocabulary
    return int(PROCESS + weights + gradients + optimizer + activations + logits)


def frozen_memory(size: ModelSize, num_models: int = 1) -> int:
    return int(PROCESS + num_models * 4 * size.parameters + 0.2 * GIB)


def engine_memory(size: ModelSize, engine: EngineSection) -> int:
    bytes_per_weight = 2 if engine.dtype == "bfloat16" else 4
    return int(ENGINE_PROCESS + 2 * bytes_per_weight * size.parameters + engine.cpu_kv_cache_gib * GIB)
