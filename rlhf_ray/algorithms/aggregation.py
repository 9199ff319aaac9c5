"""How token losses become one number: weights a token, and the global denominator that they are summed over.

A loss is `sum over all tokens of weight * token loss / denominator`, where the denominator belongs to the
whole batch of an optimizer step, over all micro-batches and ranks. Its gradient is then the same for every
split.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_ray.algorithms.rows import row_ids_of, row_sums

Aggregation = Literal["token", "sequence", "constant"]


def loss_weights(offsets: Tensor, is_trained: Tensor, aggregation: Aggregation) -> Tensor:
    """[R] float32 weight of each token; 0 exactly where it is not trained.

    "token": 1, for the mean over trained tokens. "sequence": 1 / (trained tokens of the row), for the mean
    over sequences of each one's token mean; sequences without a trained token do not count. "constant": 1,
    for the sum over tokens by the number of sequences and a constant length (Liu et al. 2025, section 3.2).

    Args:
        offsets: [B + 1]; is_trained: [R] bool.
    """
    weights = is_trained.float()
    if aggregation != "sequence":
        return weights
    trained_B = row_sums(weights, offsets).clamp(min=1)
    return weights / trained_B[row_ids_of(offsets)]


def loss_denominator(offsets: Tensor, is_trained: Tensor, aggregation: Aggregation, max_length: int) -> int:
    """Trained tokens; or sequences with at least one; or, for "constant", those times `max_length`.

    Sum it over the whole batch of an optimizer step, all ranks, and divide the loss by it.

    Args:
        max_length: the longest that a response may be.
    """
    if aggregation == "token":
        return int(is_trained.sum())
    num_sequences = int((row_sums(is_trained.long(), offsets) > 0).sum())
    return num_sequences * max_length if aggregation == "constant" else num_sequences


def weighted_sum(token_losses: Tensor, weights: Tensor) -> Tensor:
    """Scalar; the token losses [R] must be finite wherever the weight is 0 (see `where_trained`)."""
    return torch.sum(token_losses * weights)
