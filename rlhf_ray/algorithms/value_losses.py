"""Losses of the critic, as sums over tokens (see `aggregation`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.algorithms.aggregation import weighted_sum
from rlhf_ray.algorithms.metrics import MetricSum, MetricSums
from rlhf_ray.algorithms.rows import where_trained


@dataclass(frozen=True)
class ValueTokens:
    """What a value loss sees of a micro-batch. All [R].

    Fields:
        values: of the critic in training; carries the gradient.
        old_values: before the first update on this batch.
        returns: the targets.
        weights: from `loss_weights`; 0 where a token is not trained, and then the other fields may hold
            anything.
    """

    values: Tensor
    old_values: Tensor
    returns: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        is_trained = self.weights != 0
        for name in ("values", "old_values", "returns"):
            object.__setattr__(self, name, where_trained(getattr(self, name), is_trained))


def value_loss(tokens: ValueTokens, cliprange_value: float | None) -> tuple[Tensor, MetricSums]:
    """0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), summed with the tokens' weights.

    The larger of the two is taken, as in the implementation that came with Schulman et al. 2017, so that
    clipping takes away a step's gradient and never its penalty. `cliprange_value=None` is the plain squared
    error.
    """
    squares = (tokens.values - tokens.returns).square()
    is_clipped = torch.zeros_like(squares, dtype=torch.bool)
    if cliprange_value is not None:
        step = (tokens.values - tokens.old_values).clamp(-cliprange_value, cliprange_value)
        clipped_squares = (tokens.old_values + step - tokens.returns).square()
        # The step rounds, so within the range the two squares may differ by a bit: go by the range.
        is_outside = (tokens.values - tokens.old_values).abs() > cliprange_value
        is_clipped = is_outside & (clipped_squares > squares)
        squares = torch.where(is_clipped, clipped_squares, squares)
    loss = weighted_sum(0.5 * squares, tokens.weights)
    mask = tokens.weights != 0
    return loss, {
        "critic/loss": MetricSum.ratio(loss, tokens.weights.sum()),
        "critic/clip_fraction": MetricSum.mean(is_clipped, mask),
        "critic/explained_variance": MetricSum.explained_variance(tokens.returns, tokens.values, mask),
        "critic/value_mean": MetricSum.mean(tokens.values, mask),
        "critic/return_mean": MetricSum.mean(tokens.returns, mask),
    }
