"""Losses that train a policy on preferences without a reward model, and the table of them.

Notation: y_c and y_r are the chosen and the rejected answer to x, |y| the tokens of an answer with its EOS,
log pi(y|x) the sum over them, and r(x, y) = log pi(y|x) - log pi_ref(y|x). Every loss is a sum over rows;
divide by the rows of the whole batch.

A soft label p and a smoothing e together say that the chosen answer is the better one with probability
q = p (1 - e) + (1 - p) e. Where q is used, the loss is its expectation over that label: q loss(y_c, y_r) +
(1 - q) loss(y_r, y_c).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_ray.algorithms.metrics import MetricSum, MetricSums
from rlhf_ray.algorithms.preference_losses import preference_cross_entropy


@dataclass(frozen=True)
class AnswerLogprobs:
    """[B] each: log-probs of whole answers under the policy and the reference, and their tokens."""

    policy: Tensor
    reference: Tensor
    lengths: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """r(x, y)"""
        return self.policy - self.reference

    @property
    def mean(self) -> Tensor:
        """log pi(y|x) / |y|"""
        return self.policy / self.lengths


@dataclass(frozen=True)
class PairLogprobs:
    """Fields: soft_label: [B] probability that chosen is really the better one."""

    chosen: AnswerLogprobs
    rejected: AnswerLogprobs
    soft_label: Tensor


@dataclass(frozen=True)
class PairLossSpec:
    """Fields: gamma: the margin of SimPO."""

    beta: float
    label_smoothing: float = 0.0
    gamma: float = 0.0


def _targets(pairs: PairLogprobs, spec: PairLossSpec) -> Tensor:
    """q of the module's docstring, [B]."""
    return pairs.soft_label * (1 - 2 * spec.label_smoothing) + spec.label_smoothing


def dpo_loss(pairs: PairLogprobs, spec: PairLossSpec) -> Tensor:
    """-log sigmoid(beta (r_c - r_r)) (Rafailov et al. 2023, equation 7), [B].

    With q below 1 the cross entropy, which is conservative DPO for p = 1 (Mitchell 2023): its optimum is a
    finite margin, log(q / (1 - q)) / beta.
    """
    logits = spec.beta * (pairs.chosen.log_ratio - pairs.rejected.log_ratio)
    return preference_cross_entropy(logits, _targets(pairs, spec))


def ipo_loss(pairs: PairLogprobs, spec: PairLossSpec) -> Tensor:
    """(h - 1 / (2 beta))^2 with h = r_c / |y_c| - r_r / |y_r| (Azar et al. 2023, equation 17), [B].

    The paper's h has sums over tokens, whose target margin would be the same for answers of 5 and of 500
    tokens. TRL's has means, which its authors report to be what the paper's experiments did; so is this.
    """
    h = pairs.chosen.log_ratio / pairs.chosen.lengths - pairs.rejected.log_ratio / pairs.rejected.lengths
    q, margin = _targets(pairs, spec), 1 / (2 * spec.beta)
    return q * (h - margin).square() + (1 - q) * (h + margin).square()


def hinge_loss(pairs: PairLogprobs, spec: PairLossSpec) -> Tensor:
    """max(0, 1 - beta (r_c - r_r)) (SLiC, Zhao et al. 2023; relative to a reference, Liu et al. 2023), [B].

    The expectation over an uncertain label has the same optimum as a certain one, at a slope of 2 q - 1: such
    pairs weigh less.
    """
    logits = spec.beta * (pairs.chosen.log_ratio - pairs.rejected.log_ratio)
    q = _targets(pairs, spec)
    return q * torch.relu(1 - logits) + (1 - q) * torch.relu(1 + logits)


def log_odds(mean_logprobs: Tensor) -> Tensor:
    """log(P / (1 - P)) for P = exp(mean log-prob), [B] (Hong et al. 2024, equations 3 and 4).

    An answer of which every token is certain has infinite odds, and no gradient here.
    """
    below = mean_logprobs.clamp(max=-torch.finfo(mean_logprobs.dtype).eps)
    return below - torch.log(-torch.expm1(below))


def orpo_loss(pairs: PairLogprobs, spec: PairLossSpec) -> Tensor:
    """-log pi(y_c|x) / |y_c| - beta log sigmoid(log odds(y_c) - log odds(y_r)) (Hong et al. 2024, equations 6
    and 7, whose lambda is beta), [B].

    The first term is the mean over the tokens of each answer, as the paper's P(y|x) is; TRL's is the mean
    over all tokens of a micro-batch, prompts included.
    """
    difference = log_odds(pairs.chosen.mean) - log_odds(pairs.rejected.mean)
    return -pairs.chosen.mean - spec.beta * F.logsigmoid(difference)


def simpo_loss(pairs: PairLogprobs, spec: PairLossSpec) -> Tensor:
    """-log sigmoid(beta log pi(y_c|x) / |y_c| - beta log pi(y_r|x) / |y_r| - gamma) (Meng et al. 2024,
    equation 6), [B]."""
    return -F.logsigmoid(spec.beta * (pairs.chosen.mean - pairs.rejected.mean) - spec.gamma)


@dataclass(frozen=True)
class KTOSpec:
    """Fields: kl: z_0, from `kl_estimate`, the same for the whole batch."""

    beta: float
    desirable_weight: float
    undesirable_weight: float
    kl: float


def kl_estimate(mismatched: AnswerLogprobs) -> float:
    """z_0 = max(0, mean of r(x, y') over prompts x with answers y' to other prompts) (Ethayarajh et al. 2024,
    section 4.1), a biased estimate of the KL to the reference that needs no sampling. No gradient.

    Args:
        mismatched: of all rows of the whole batch.
    """
    return max(0.0, mismatched.log_ratio.double().mean().item())


def kto_loss(answers: AnswerLogprobs, is_desirable: Tensor, spec: KTOSpec) -> tuple[Tensor, MetricSums]:
    """lambda_D (1 - sigmoid(beta (r - z_0))) for a desirable answer, lambda_U (1 - sigmoid(beta (z_0 - r)))
    for an undesirable one (Ethayarajh et al. 2024, section 4.1), summed over answers.

    Args:
        is_desirable: [B] bool.
    """
    logits = spec.beta * (answers.log_ratio - spec.kl)
    losses = torch.where(
        is_desirable,
        spec.desirable_weight * torch.sigmoid(-logits),
        spec.undesirable_weight * torch.sigmoid(logits),
    )
    metrics = {"preference/loss": _mean(losses)}
    for name, mask in (("chosen", is_desirable), ("rejected", ~is_desirable)):
        metrics[f"rewards/{name}"] = MetricSum.mean(spec.beta * answers.log_ratio, mask)
        metrics[f"logps/{name}"] = MetricSum.mean(answers.policy, mask)
    return losses.sum(), metrics


@dataclass(frozen=True)
class PairAlgorithm:
    """A row of the table.

    Fields:
        loss: [B] losses of pairs.
        score: [B] implicit rewards of answers, but for the factor beta.
        needs_reference: whether the loss looks at the reference.
        takes_soft_labels: whether a target below 1 has a meaning.
    """

    loss: Callable[[PairLogprobs, PairLossSpec], Tensor]
    score: Callable[[AnswerLogprobs], Tensor]
    needs_reference: bool
    takes_soft_labels: bool


@dataclass(frozen=True)
class UnpairedAlgorithm:
    """A row of the table that learns from single answers, by `kto_loss`."""

    score: Callable[[AnswerLogprobs], Tensor]
    needs_reference: bool = True
    takes_soft_labels: bool = False


def _log_ratio(answers: AnswerLogprobs) -> Tensor:
    return answers.log_ratio


def _mean_logprob(answers: AnswerLogprobs) -> Tensor:
    return answers.mean


# ORPO's likelihood term and SimPO's margin belong to the chosen answer alone: swapping the answers of a
# doubtful pair would not undo them.
PREFERENCE_ALGORITHMS: dict[str, PairAlgorithm | UnpairedAlgorithm] = {
    "dpo": PairAlgorithm(dpo_loss, _log_ratio, needs_reference=True, takes_soft_labels=True),
    "ipo": PairAlgorithm(ipo_loss, _log_ratio, needs_reference=True, takes_soft_labels=True),
    "hinge": PairAlgorithm(hinge_loss, _log_ratio, needs_reference=True, takes_soft_labels=True),
    "orpo": PairAlgorithm(orpo_loss, _mean_logprob, needs_reference=False, takes_soft_labels=False),
    "simpo": PairAlgorithm(simpo_loss, _mean_logprob, needs_reference=False, takes_soft_labels=False),
    "kto": UnpairedAlgorithm(_log_ratio),
}
"""The algorithms of the preference stage, by the name that the configuration gives."""


def pair_loss(algorithm: PairAlgorithm, pairs: PairLogprobs, spec: PairLossSpec) -> tuple[Tensor, MetricSums]:
    """The algorithm's loss, summed over pairs, and metrics under TRL's names.

    `logps/...` are sums over the answers' tokens, or means where the algorithm looks at means.
    """
    losses = algorithm.loss(pairs, spec)
    chosen, rejected = (spec.beta * algorithm.score(side) for side in (pairs.chosen, pairs.rejected))
    difference = (chosen - rejected).detach()
    metrics = {
        "preference/loss": _mean(losses),
        "rewards/chosen": _mean(chosen),
        "rewards/rejected": _mean(rejected),
        # 1 for a pair in the right order, a half for a tie, 0 otherwise.
        "rewards/accuracies": _mean((1 + difference.sign()) / 2),
        "rewards/margins": _mean(difference),
    }
    for name, side in (("chosen", pairs.chosen), ("rejected", pairs.rejected)):
        metrics[f"logps/{name}"] = _mean(side.policy if algorithm.needs_reference else side.mean)
    return losses.sum(), metrics


def _mean(values: Tensor) -> MetricSum:
    return MetricSum.mean(values, torch.ones_like(values, dtype=torch.bool))
