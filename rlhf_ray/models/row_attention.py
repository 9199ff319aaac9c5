"""Attention over a packed row, sequence by sequence.

For a row that holds several sequences the library masks a square over all of it, and computes the square.
Here every sequence attends by itself, with the library's own kernel: no padding anywhere, and no work between
sequences. FlashAttention does the same on a GPU in one kernel.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf_ray.config.schema import Layout
from rlhf_ray.models.batching import TokenBatch, collate
from rlhf_ray.models.heads import BY_ROWS
from rlhf_ray.models.sharing import TOLERANCE, distance
from rlhf_ray.types import Ragged

WRAPPED = "sdpa"


def attend_by_rows(model: PreTrainedModel) -> bool:
    """Let the model do so from now on, if it can: its attention is sdpa without windows, and a trial gives
    the hidden states of sequences alone. Else it stays as it is, masks included, and the answer is False."""
    config = model.config.get_text_config()
    has_windows = getattr(config, "sliding_window", None) or set(
        getattr(config, "layer_types", None) or ()
    ) - {"full_attention"}
    if model.config._attn_implementation != WRAPPED or has_windows:
        return False
    ALL_ATTENTION_FUNCTIONS.register(BY_ROWS, _by_rows)
    model.set_attn_implementation(BY_ROWS)
    try:
        is_exact = distance(model, _trial(model, "padded"), _trial(model, "packed")) < TOLERANCE
    except (TypeError, ValueError, RuntimeError):
        is_exact = False
    if not is_exact:
        model.set_attn_implementation(WRAPPED)
    return is_exact


def _by_rows(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sequence_lengths: list[int] | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Args: query, key, value: [1, heads, t, d]. sequence_lengths: t in all; None where rows are not packed.

    Returns: [1, t, heads, d].
    """
    attend = ALL_ATTENTION_FUNCTIONS[WRAPPED]
    if sequence_lengths is None:
        return attend(module, query, key, value, attention_mask, **options)
    cut = (tensor.split(sequence_lengths, dim=2) for tensor in (query, key, value))
    parts = [attend(module, q, k, v, None, **options)[0] for q, k, v in zip(*cut, strict=True)]
    return torch.cat(parts, dim=1), None


def _trial(model: PreTrainedModel, layout: Layout) -> TokenBatch:
    """Three sequences, of which every hidden state is wanted. What is padded is computed without lengths, as
    the wrapped kernel does it."""
    vocabulary = model.config.get_text_config().vocab_size
    tokens = np.random.default_rng(0).integers(vocabulary, size=24).astype(np.int32)
    sequences = Ragged.from_rows([tokens[:5], tokens[5:14], tokens[14:]], np.int32)
    return collate(sequences, np.ones(len(tokens), dtype=bool), layout, model.device)
