"""The loss of a reward model on preference pairs, and how good its probabilities are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rlhf_ray.algorithms.metrics import MetricSum, MetricSums
from rlhf_ray.types import Metrics


def preference_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-p log sigmoid(z) - (1 - p) log sigmoid(-z), each: of the statement "chosen is preferred", true with
    probability p, for log-odds z."""
    return -targets * F.logsigmoid(logits) - (1 - targets) * F.logsigmoid(-logits)


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor,
    soft_label: Tensor,
    center_rewards_coefficient: float = 0.0,
) -> tuple[Tensor, MetricSums]:
    """-log sigmoid(r_c - r_r - margin) + center_rewards_coefficient * (r_c + r_r)^2, summed over pairs.

    With a soft label the first term becomes the cross entropy with that probability.

    Divide by the number of pairs of the whole batch. The loss is Ouyang et al. 2022, equation 1; the margin
    Touvron et al. 2023, equation 2; the centring, which pins down the scores' free constant, Eisenstein et
    al. 2023.

    Args:
        chosen, rejected: [B] scores; B may be 0.
        margin: [B] by how much the chosen score has to lead, 0 where nothing is known.
        soft_label: [B] probability that chosen is really preferred; 1 where nobody doubts it.
    """
    difference = chosen - rejected
    loss = preference_cross_entropy(difference - margin, soft_label).sum()
    if center_rewards_coefficient:
        loss = loss + center_rewards_coefficient * (chosen + rejected).square().sum()
    # 1 for a pair in the right order, a half for a tie, 0 otherwise.
    accuracy = (1 + difference.detach().sign()) / 2
    every = torch.ones_like(difference, dtype=torch.bool)
    return loss, {
        "reward/loss": MetricSum.ratio(loss, every.sum()),
        "reward/accuracy": MetricSum.mean(accuracy, every),
        "reward/margin": MetricSum.mean(difference, every),
    }


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs of similar confidence: their mean confidence, the share that was right, and how many they are."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """How far the probabilities sigmoid(margin) can be believed, on held-out pairs.

    Fields:
        expected_calibration_error: mean over pairs of |accuracy - confidence| of the pair's bin (Guo et al.
            2017).
        brier_score: mean of (1 - P(chosen preferred))^2; 0.25 for a coin.
        log_loss: mean of -log P(chosen preferred), in nats; log 2 for a coin.
        bins: the non-empty ones, in order of confidence.
    """

    expected_calibration_error: float
    brier_score: float
    log_loss: float
    bins: tuple[ReliabilityBin, ...]

    @property
    def metrics(self) -> Metrics:
        return {
            "reward/calibration_error": self.expected_calibration_error,
            "reward/brier_score": self.brier_score,
            "reward/log_loss": self.log_loss,
        }


def calibration(margins: NDArray[np.floating], num_bins: int = 10) -> Calibration:
    """Compare the confidence of each pair with how often such pairs are right.

    Chosen always comes first here, so the probability of the label would say nothing: the model's
    *prediction* is the answer with the higher score, its confidence sigmoid(|margin|), in equal bins from
    0.5 to 1. A tie is half right.

    Args:
        margins: [N] score of chosen minus score of rejected, N > 0.
    """
    if len(margins) == 0:
        raise ValueError("calibration of no pairs")
    margins = margins.astype(np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    is_right = (1 + np.sign(margins)) / 2
    bin_ids = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(np.int64), num_bins - 1)
    bins = []
    for bin_id in np.unique(bin_ids):
        inside = bin_ids == bin_id
        mean_confidence, accuracy = float(confidence[inside].mean()), float(is_right[inside].mean())
        bins.append(ReliabilityBin(mean_confidence, accuracy, int(inside.sum())))
    error = sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / len(margins)
    wrong = np.where(margins > 0, 1 - confidence, confidence)  # 1 - P(chosen preferred)
    log_loss = float(np.logaddexp(0, -margins).mean())
    return Calibration(error, float((wrong**2).mean()), log_loss, tuple(bins))


def length_baseline(chosen_lengths: NDArray[np.integer], rejected_lengths: NDArray[np.integer]) -> float:
    """Accuracy of the rule "the longer answer wins", ties half: what a reward model has to beat.

    Args:
        chosen_lengths, rejected_lengths: [N] tokens, N > 0.
    """
    if len(chosen_lengths) == 0:
        raise ValueError("length baseline of no pairs")
    return float(((1 + np.sign(chosen_lengths.astype(np.int64) - rejected_lengths)) / 2).mean())
