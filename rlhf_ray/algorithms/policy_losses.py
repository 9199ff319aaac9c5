"""Losses of the policy, as sums over tokens (see `aggregation`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf_ray.algorithms.aggregation import weighted_sum
from rlhf_ray.algorithms.kl import kl_per_token
from rlhf_ray.algorithms.metrics import MetricSum, MetricSums
from rlhf_ray.algorithms.rows import where_trained


@dataclass(frozen=True)
class PolicyTokens:
    """What a policy loss sees of a micro-batch. All [R].

    Fields:
        logprobs: of the sampled tokens under the policy in training; carries the gradient.
        entropy: of the distribution that each token was sampled from, in nats; carries a gradient if it is
            rewarded.
        old_logprobs: under the policy before the first update on this batch.
        ref_logprobs: under the frozen reference.
        advantages: constants.
        weights: from `loss_weights`; 0 where a token is not trained, and then the other fields may hold
            anything.
    """

    logprobs: Tensor
    entropy: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        is_trained = self.weights != 0
        for name in ("logprobs", "entropy", "old_logprobs", "ref_logprobs", "advantages"):
            object.__setattr__(self, name, where_trained(getattr(self, name), is_trained))

    @property
    def is_trained(self) -> Tensor:
        return self.weights != 0


@dataclass(frozen=True)
class KLInLoss:
    """coef * KL(policy || reference) in the loss.

    Not with k1: its gradient does not depend on the reference (see `kl_per_token`).
    """

    coef: float
    estimator: Literal["k2", "k3"]

    def __post_init__(self) -> None:
        if self.estimator not in ("k2", "k3"):
            raise ValueError(f"kl_estimator={self.estimator}: in the loss use k2 or k3")


@dataclass(frozen=True)
class PolicyLossSpec:
    """
    Fields:
        cliprange_low, cliprange_high: the ratio is clipped to [1 - cliprange_low, 1 + cliprange_high].
        entropy_coef: times the entropy is subtracted from the loss.
        kl: None where the KL to the reference is in the reward, or nowhere.
    """

    cliprange_low: float
    cliprange_high: float
    entropy_coef: float = 0.0
    kl: KLInLoss | None = None


def ppo_policy_loss(tokens: PolicyTokens, spec: PolicyLossSpec) -> tuple[Tensor, MetricSums]:
    """The clipped surrogate (Schulman et al. 2017, equation 7) with entropy bonus (equation 9) and KL term.

    -min(ratio A, clip(ratio, 1 - low, 1 + high) A) - entropy_coef * H + kl.coef * KL, summed with the
    tokens' weights; ratio = pi / pi_old.
    """
    log_ratio = tokens.logprobs - tokens.old_logprobs
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - spec.cliprange_low, 1 + spec.cliprange_high)
    token_losses = -torch.minimum(ratio * tokens.advantages, clipped * tokens.advantages)
    token_losses, metrics = _add_regularisers(token_losses, tokens, spec)
    loss = weighted_sum(token_losses, tokens.weights)
    mask = tokens.is_trained
    # Where the clipped term is the smaller one, so that the token has no gradient.
    low = (ratio < 1 - spec.cliprange_low) & (tokens.advantages < 0)
    high = (ratio > 1 + spec.cliprange_high) & (tokens.advantages > 0)
    metrics |= {
        "policy/loss": MetricSum.ratio(loss, tokens.weights.sum()),
        "policy/clip_ratio/low": MetricSum.mean(low, mask),
        "policy/clip_ratio/high": MetricSum.mean(high, mask),
    }
    return loss, metrics | _ratio_metrics(tokens, ratio)


def _add_regularisers(
    token_losses: Tensor, tokens: PolicyTokens, spec: PolicyLossSpec
) -> tuple[Tensor, MetricSums]:
    """The token losses [R] with entropy bonus and KL term, and the metrics of the two."""
    metrics = {"policy/entropy": MetricSum.mean(tokens.entropy, tokens.is_trained)}
    if spec.entropy_coef:
        token_losses = token_losses - spec.entropy_coef * tokens.entropy
    if spec.kl:
        kl = kl_per_token(tokens.logprobs, tokens.ref_logprobs, spec.kl.estimator)
        token_losses = token_losses + spec.kl.coef * kl
        metrics["kl/in_loss"] = MetricSum.mean(spec.kl.coef * kl, tokens.is_trained)
    return token_losses, metrics


def _ratio_metrics(tokens: PolicyTokens, ratio: Tensor) -> MetricSums:
    """How far the policy has moved from the one that sampled; the KL is KL(pi_old || pi)."""
    mask = tokens.is_trained
    metrics = {"policy/ratio": MetricSum.mean(ratio, mask), "policy/ratio_max": MetricSum.max(ratio, mask)}
    for estimator in ("k1", "k2", "k3"):
        kl = kl_per_token(tokens.old_logprobs, tokens.logprobs, estimator)
        metrics[f"policy/approx_kl_{estimator}"] = MetricSum.mean(kl, mask)
    return metrics
