"""How much main memory an actor of each role takes: what `rlhf_ray.planning` says of its model on a CPU. It
decides whether a placement is refused before anything starts."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.config.schema import EngineSection, ModelSection, TrainingSection
from rlhf_ray.models.adapters import linear_layers
from rlhf_ray.models.loading import model_config
from rlhf_ray.planning import memory
from rlhf_ray.planning.hardware import cpu
from rlhf_ray.planning.shapes import ModelShape

PROCESS = int(memory.ON_CPU.trainer)
"""An actor with torch and transformers imported."""
_CPU = cpu(cores=1, memory=0)


def model_size(model: ModelSection) -> ModelShape:
    """Shape of the causal language model, from its configuration alone; of any architecture."""
    config = model_config(model)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    skeleton.tie_weights()
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    text = config.get_text_config()
    heads = text.num_attention_heads
    return ModelShape(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        counted=parameters,
        adaptable=tuple(linear_layers(skeleton).items()),
    )


def trained_memory(shape: ModelShape, training: TrainingSection, ranks: int, longest: int = 0) -> int:
    """Bytes a rank. longest: tokens of the longest row, where it may be more than a micro-batch's budget."""
    return int(memory.trained("policy", shape, training, ranks=ranks, longest=longest, device=_CPU).peak)


def frozen_memory(
    shape: ModelShape,
    training: TrainingSection,
    num_models: int = 1,
    *,
    num_ranks: int = 1,
    scores: bool = False,
) -> int:
    """
    Args:
        num_ranks: that hold a part each. scores: reward models, which have no head.
    """
    role: memory.Frozen = "reward" if scores else "reference"
    shapes = [shape] * num_models
    return int(memory.frozen(role, shapes, training, ranks=num_ranks, longest=0, device=_CPU).peak)


def engine_memory(shape: ModelShape, engine: EngineSection) -> int:
    return int(memory.engine("engine", shape, engine, longest=0, device=_CPU).peak)
