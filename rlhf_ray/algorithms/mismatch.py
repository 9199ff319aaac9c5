"""How far the trainer's log-probs are from the sampler's under what should be the same weights."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.algorithms.kl import kl_per_token
from rlhf_ray.algorithms.metrics import MetricSum, MetricSums
from rlhf_ray.algorithms.rows import where_trained


def mismatch_metrics(trainer_logprobs: Tensor, sampler_logprobs: Tensor, is_trained: Tensor) -> MetricSums:
    """Metrics over trained tokens. Under equal weights they show the numerical differences and nothing else.

    The KL is KL(sampler || trainer) in nats a token, by k3; the ratio is trainer / sampler.

    Args:
        trainer_logprobs, sampler_logprobs: [R] of the sampled tokens, at the same temperature.
        is_trained: [R] bool; the fraction where it is False is reported.
    """
    trainer = where_trained(trainer_logprobs, is_trained)
    sampler = where_trained(sampler_logprobs, is_trained)
    distance = (trainer - sampler).abs()
    ratio = torch.exp(trainer - sampler)
    return {
        "mismatch/logprob_diff_mean": MetricSum.mean(distance, is_trained),
        "mismatch/logprob_diff_max": MetricSum.max(distance, is_trained),
        "mismatch/kl": MetricSum.mean(kl_per_token(sampler, trainer, "k3"), is_trained),
        "mismatch/ratio_min": MetricSum.min(ratio, is_trained),
        "mismatch/ratio_mean": MetricSum.mean(ratio, is_trained),
        "mismatch/ratio_max": MetricSum.max(ratio, is_trained),
        "mismatch/fraction_masked": MetricSum.mean(~is_trained, torch.ones_like(is_trained)),
    }
