"""Whether a model computes answers behind a shared prompt as it computes them alone."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf_ray.config.schema import Layout
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.batching import TokenBatch, before_responses, collate
from rlhf_ray.models.heads import hidden_states
from rlhf_ray.types import Ragged

TOLERANCE = 1e-3
"""Of the largest hidden state. Float32 rounds by less; a model that looks at other answers errs by more."""
FULL = "full_attention"


def check_sharing(model: PreTrainedModel) -> None:
    """Try it on a small group of answers.

    Raises:
        ConfigError: the model's hidden states depend on the layout.
    """
    config = model.config.get_text_config()
    usual = "sliding_attention" if getattr(config, "sliding_window", None) else FULL
    kinds = set(getattr(config, "layer_types", None) or [usual]) - {FULL}
    if kinds:  # windows are wider than the trial, which would not see that they are lost
        raise ConfigError(
            f"training.share_prompts=true: {type(model).__name__} has layers of {', '.join(sorted(kinds))}, "
            "and prompts can be shared under full attention only; leave share_prompts out"
        )
    try:
        error_of_shared = _distance(model)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(_refusal(model, f"fails ({str(error).splitlines()[0]})")) from error
    if not error_of_shared < TOLERANCE:
        raise ConfigError(_refusal(model, f"gives other hidden states (by {error_of_shared:.2g})"))


def _refusal(model: PreTrainedModel, what: str) -> str:
    return (
        f"training.share_prompts=true: {type(model).__name__} with {model.config._attn_implementation} "
        f"attention {what} where answers share a prompt; leave share_prompts out"
    )


def _distance(model: PreTrainedModel) -> float:
    vocabulary = model.config.get_text_config().vocab_size
    tokens = np.random.default_rng(0).integers(vocabulary, size=24).astype(np.int32)
    prompts = Ragged.from_rows([tokens[:5]] * 3, np.int32)
    sequences = Ragged.join(prompts, Ragged.from_rows([tokens[5:12], tokens[12:15], tokens[15:]], np.int32))
    is_source = before_responses(prompts.lengths, sequences)
    layouts: tuple[Layout, Layout] = ("padded", "shared")
    alone, shared = (collate(sequences, is_source, layout, model.device, prompts) for layout in layouts)
    return distance(model, alone, shared)


@torch.no_grad()
def distance(model: PreTrainedModel, alone: TokenBatch, together: TokenBatch) -> float:
    """Largest difference of one selection in two layouts, relative to the largest hidden state."""
    was_training = model.training
    model.eval()
    expected, found = hidden_states(model, alone), hidden_states(model, together)
    model.train(was_training)
    return float((expected - found).abs().max() / expected.abs().max())
