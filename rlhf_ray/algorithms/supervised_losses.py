"""The loss of supervised fine-tuning, as a sum over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.algorithms.metrics import MetricSum, MetricSums


def next_token_loss(target_logprobs: Tensor, is_top: Tensor) -> tuple[Tensor, MetricSums]:
    """Negative log-likelihood of the targets, summed; divide by the number of targets of the whole batch.

    Args:
        target_logprobs: [N] log-prob of each target token, and of nothing else; N may be 0.
        is_top: [N] bool, True where the target was the most likely token.
    """
    every = torch.ones_like(is_top, dtype=torch.bool)
    return -target_logprobs.sum(), {
        "sft/loss": MetricSum.mean(-target_logprobs, every),
        "sft/perplexity": MetricSum.exp_mean(-target_logprobs, every),
        "sft/token_accuracy": MetricSum.mean(is_top, every),
    }
