"""Off-policy correction: the sampler is not quite the trainer, even where their weights are the same.

Engines compute in another precision and with other kernels, and with asynchrony under older weights. The
gradient is then an expectation over the wrong distribution; importance sampling corrects it. Truncation
bounds the variance (Ionides 2008; Yao et al. 2025, "Your efficient RL framework secretly brings you
off-policy RL training"); masking leaves outliers out altogether.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf_ray.algorithms.metrics import MetricSum, MetricSums
from rlhf_ray.algorithms.rows import row_ids_of, row_sums, where_trained

Level = Literal["token", "sequence", "geometric"]
Mode = Literal["truncate", "mask"]
LOG_LIMIT = 20.0
"""The product over a long sequence would overflow; e^20 is far beyond any cap."""


@dataclass(frozen=True)
class Correction:
    """
    Fields:
        level: what a ratio is of: one token; the product over a sequence; or its geometric mean a token.
        mode: `truncate` takes min(ratio, cap); `mask` takes the ratio where it is in [1 / cap, cap] and 0
            elsewhere, except that a geometric mean only decides and does not weigh.
        cap: above 1.
    """

    level: Level
    mode: Mode
    cap: float


def importance_weights(
    trainer_logprobs: Tensor, sampler_logprobs: Tensor, offsets: Tensor, is_trained: Tensor, spec: Correction
) -> Tensor:
    """[R] constants to multiply the token losses with; 1 where a token is not trained.

    Args:
        trainer_logprobs, sampler_logprobs: [R] of the sampled tokens, at the same temperature.
        offsets: [B + 1]; is_trained: [R] bool.
    """
    ratio = _ratio(trainer_logprobs, sampler_logprobs, offsets, is_trained, spec.level)
    if spec.mode == "truncate":
        weights = ratio.clamp(max=spec.cap)
    else:
        kept = torch.ones_like(ratio) if spec.level == "geometric" else ratio
        weights = torch.where(_is_inside(ratio, spec.cap), kept, 0.0)
    return torch.where(is_trained, weights, 1.0).to(trainer_logprobs.dtype)


def remaining_weights(
    trainer_logprobs: Tensor, sampler_logprobs: Tensor, offsets: Tensor, is_trained: Tensor, spec: Correction
) -> Tensor:
    """As `importance_weights`, for a loss whose own ratio is trainer / sampler already.

    What is left to do is to cut that ratio (min(1, cap / ratio)), or to leave tokens out (1 or 0).
    """
    ratio = _ratio(trainer_logprobs, sampler_logprobs, offsets, is_trained, spec.level)
    if spec.mode == "truncate":
        weights = (spec.cap / ratio).clamp(max=1.0)
    else:
        weights = _is_inside(ratio, spec.cap).double()
    return torch.where(is_trained, weights, 1.0).to(trainer_logprobs.dtype)


def _ratio(trainer: Tensor, sampler: Tensor, offsets: Tensor, is_trained: Tensor, level: Level) -> Tensor:
    """[R] float64, without gradient, of what the level says."""
    log_ratio = where_trained((trainer - sampler).detach().double(), is_trained)
    if level != "token":
        per_row = row_sums(log_ratio, offsets)
        if level == "geometric":
            per_row = per_row / row_sums(is_trained.double(), offsets).clamp(min=1)
        log_ratio = per_row[row_ids_of(offsets)]
    return torch.exp(log_ratio.clamp(-LOG_LIMIT, LOG_LIMIT))


def _is_inside(ratio: Tensor, cap: float) -> Tensor:
    return (ratio >= 1 / cap) & (ratio <= cap)


def correction_metrics(weights: Tensor, is_trained: Tensor) -> MetricSums:
    """`mismatch/weight_mean`, and the share of trained tokens that the correction leaves out."""
    return {
        "mismatch/weight_mean": MetricSum.mean(weights, is_trained),
        "mismatch/fraction_masked": MetricSum.mean(weights == 0, is_trained),
    }
