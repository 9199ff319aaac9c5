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

from rlhf_ray.models.batching import collate
from rlhf_ray.models.heads import BY_ROWS, hidden_states
from rlhf_ray.types import Ragged

WRAPPED = "sdpa"
TOLERANCE = 1e-3
"""Of the largest hidden state. Float32 rounds by less; a model that looks at other sequences errs by more."""


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
    sequences = _trial(config.vocab_size)
    alone = _hidden(model, sequences, packed=False)
    model.set_attn_implementation(BY_ROWS)
    try:
        distance = (alone - _hidden(model, sequences, packed=True)).abs().max() / alone.abs().max()
        is_exact = bool(distance < TOLERANCE)
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


def _trial(vocabulary: int) -> Ragged:
    tokens = np.random.default_rng(0).integers(vocabulary, size=24).astype(np.int32)
    return Ragged.from_rows([tokens[:5], tokens[5:14], tokens[14:]], np.int32)


@torch.no_grad()
def _hidden(model: PreTrainedModel, sequences: Ragged, packed: bool) -> torch.Tensor:
    everywhere = np.ones(len(sequences.values), dtype=bool)
    was_training = model.training
    model.eval()
    found = hidden_states(
        model, collate(sequences, everywhere, "packed" if packed else "padded", model.device)
    )
    model.train(was_training)
    return found
