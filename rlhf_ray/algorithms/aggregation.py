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

Aggregation = Literal["token", "sequence"]


def loss_weights(offsets: Tensor, is_trained: Tensor, aggregation: Aggregation) -> Tensor:
    """[R] float32 weight of each token; 0 exactly where it is not trained.

    "token": 1, for the mean over trained tokens. "sequence": 1 / (trained tokens of the row), for the mean
    over sequences of each one's token mean; sequences without a trained token do not count.

    Args:
        offsets: [B + 1]; is_trained: [R] bool.
    """
    weights = is_trained.float()
    if aggregation == "token":
        return weights
    trained_B = row_sums(weights, offsets).clamp(min=1)
    return weights / trained_B[row_ids_of(offsets)]


def loss_denominator(offsets: Tensor, is_trained: Tensor, aggregation: Aggregation) -> int:
    """Trained tokens, or sequences with at least one: an exact count of what `loss_weights` adds up to.

    Sum it over the whole batch of an optimizer step, all ranks, and divide the loss by it.
    """
    if aggregation == "token":
        return int(is_trained.sum())
    return int((row_sums(is_trained.long(), offsets) > 0).sum())


def weighted_sum(token_losses: Tensor, weights: Tensor) -> Tensor:
    """Scalar; the token losses [R] must be finite wherever the weight is 0 (see `where_trained`)."""
    return torch.sum(token_losses * weights)
