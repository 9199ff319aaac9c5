"""Losses of the policy, as sums over tokens (see `aggregation`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf_ray.algorithms.aggregation import weighted_sum
from rlhf_ray.algorithms.kl import kl_per_token
from rlhf_ray.algorithms.metrics import MetricSum, MetricSums
from rlhf_ray.algorithms.rows import row_ids_of, row_sums, where_trained


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
        importance_weights: from `importance_weights`; constants. None where the sampler counts as the policy
            before the update.
        offsets: [B + 1] whole rows, for losses that look at sequences.
    """

    logprobs: Tensor
    entropy: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    importance_weights: Tensor | None = None
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        is_trained = self.weights != 0
        for name in ("logprobs", "entropy", "old_logprobs", "ref_logprobs", "advantages"):
            object.__setattr__(self, name, where_trained(getattr(self, name), is_trained))
        if self.importance_weights is not None:
            object.__setattr__(self, "importance_weights", where_trained(self.importance_weights, is_trained))

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
    return _finish(token_losses, ratio, tokens, spec)


def gspo_policy_loss(tokens: PolicyTokens, spec: PolicyLossSpec) -> tuple[Tensor, MetricSums]:
    """The clipped surrogate of whole sequences (GSPO: Zheng et al. 2025, equations 5 to 7).

    As `ppo_policy_loss`, with one ratio a sequence, the geometric mean of its trained tokens' ratios:
    s = exp(mean of log pi - log pi_old). Meant for weights of aggregation "sequence".
    """
    assert tokens.offsets is not None
    # Untrained tokens have log-probs 0 on both sides, and so add nothing to the sum.
    log_ratio = row_sums(tokens.logprobs - tokens.old_logprobs, tokens.offsets)
    trained_B = row_sums(tokens.is_trained.to(log_ratio.dtype), tokens.offsets).clamp(min=1)
    ratio = torch.exp(log_ratio / trained_B)[row_ids_of(tokens.offsets)]
    clipped = ratio.clamp(1 - spec.cliprange_low, 1 + spec.cliprange_high)
    token_losses = -torch.minimum(ratio * tokens.advantages, clipped * tokens.advantages)
    return _finish(token_losses, ratio, tokens, spec)


def cispo_policy_loss(tokens: PolicyTokens, spec: PolicyLossSpec) -> tuple[Tensor, MetricSums]:
    """-clip(ratio).detach() A log pi (CISPO: MiniMax 2025, equations 4 and 5): no token loses its gradient.

    The ratio is clipped to [1 - cliprange_low, 1 + cliprange_high]; the paper leaves the lower side open.
    """
    ratio = torch.exp(tokens.logprobs.detach() - tokens.old_logprobs)
    clipped = ratio.clamp(1 - spec.cliprange_low, 1 + spec.cliprange_high)
    return _finish(-clipped * tokens.advantages * tokens.logprobs, ratio, tokens, spec)


def likelihood_loss(tokens: PolicyTokens, spec: PolicyLossSpec) -> tuple[Tensor, MetricSums]:
    """-A log pi, without a ratio: fine-tuning on chosen samples, where A is 1 (RAFT: Dong et al. 2023)."""
    ratio = torch.exp(tokens.logprobs.detach() - tokens.old_logprobs)
    return _finish(-tokens.advantages * tokens.logprobs, ratio, tokens, spec)


def _finish(
    token_losses: Tensor, ratio: Tensor, tokens: PolicyTokens, spec: PolicyLossSpec
) -> tuple[Tensor, MetricSums]:
    """What all losses share: importance weights, regularisers, the sum, and the metrics.

    Args:
        token_losses: [R] with gradient. ratio: [R] pi / pi_old as the loss sees it.
    """
    if tokens.importance_weights is not None:
        token_losses = token_losses * tokens.importance_weights
    token_losses, metrics = _add_regularisers(token_losses, tokens, spec)
    loss = weighted_sum(token_losses, tokens.weights)
    mask = tokens.is_trained
    # Where the clipped term is the smaller one.
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
