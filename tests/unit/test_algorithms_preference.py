"""The reward model's loss, its calibration, and the baseline that it has to beat."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.metrics import finalise
from rlhf_ray.algorithms.preference_losses import bradley_terry_loss, calibration, length_baseline


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_loss_by_hand() -> None:
    chosen, rejected = torch.tensor([2.0, 0.5, 1.0]), torch.tensor([1.0, 1.5, 1.0])
    margin = torch.tensor([0.0, 0.0, 0.5])
    loss, metrics = bradley_terry_loss(
        chosen, rejected, margin, torch.ones(3), center_rewards_coefficient=0.1
    )
    expected = -math.log(sigmoid(1)) - math.log(sigmoid(-1)) - math.log(sigmoid(-0.5)) + 0.1 * (9 + 4 + 4)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert finalise(metrics) == pytest.approx(
        {"reward/loss": expected / 3, "reward/accuracy": 0.5, "reward/margin": 0.0}, rel=1e-6
    )


def test_equal_scores_lose_log_two() -> None:
    scores = torch.randn(8, generator=torch.Generator().manual_seed(0))
    loss, metrics = bradley_terry_loss(scores, scores, torch.zeros(8), torch.ones(8))
    assert loss.item() / 8 == pytest.approx(math.log(2))
    assert finalise(metrics)["reward/accuracy"] == 0.5


def test_only_centring_sees_a_common_shift() -> None:
    chosen, rejected, margin = torch.randn(
        (3, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    certain = torch.ones(8)
    base, shifted = (
        bradley_terry_loss(chosen + c, rejected + c, margin, certain)[0].item() for c in (0, 100)
    )
    assert shifted == pytest.approx(base, rel=1e-10)
    centred = bradley_terry_loss(chosen + 100, rejected + 100, margin, certain, 0.01)[0].item()
    assert centred - shifted == pytest.approx(0.01 * ((chosen + rejected + 200) ** 2).sum().item(), rel=1e-10)


def test_gradients_are_right_and_large_margins_do_not_overflow() -> None:
    chosen, rejected = torch.randn((2, 6), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    margin = torch.linspace(-1, 1, 6, dtype=torch.float64)
    soft_label = torch.linspace(0.5, 1, 6, dtype=torch.float64)

    def loss_of(chosen: Tensor, rejected: Tensor) -> Tensor:
        return bradley_terry_loss(chosen, rejected, margin, soft_label, 0.05)[0]

    assert torch.autograd.gradcheck(loss_of, (chosen.requires_grad_(), rejected.requires_grad_()))
    scores = torch.tensor([-500.0]), torch.tensor([500.0])
    assert bradley_terry_loss(*scores, torch.zeros(1), torch.ones(1))[0].item() == 1000.0


def test_a_doubtful_label_is_a_target_probability() -> None:
    """-p log sigmoid(z) - (1 - p) log sigmoid(-z), least where sigmoid(z) = p."""
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.5])
    soft_label = torch.tensor([0.7, 0.5])
    loss, _ = bradley_terry_loss(chosen, rejected, torch.zeros(2), soft_label)
    first = -0.7 * math.log(sigmoid(1)) - 0.3 * math.log(sigmoid(-1))
    second = -0.5 * math.log(sigmoid(-0.5)) - 0.5 * math.log(sigmoid(0.5))
    assert loss.item() == pytest.approx(first + second, rel=1e-6)
    best = torch.tensor([math.log(0.7 / 0.3), 0.0], requires_grad=True)
    bradley_terry_loss(best, torch.zeros(2), torch.zeros(2), soft_label)[0].backward()
    assert best.grad is not None and best.grad.abs().max() < 1e-6


def test_no_pairs_are_a_zero_with_a_gradient() -> None:
    parameter = torch.ones(2, requires_grad=True)
    scores = torch.empty((0, 2)) @ parameter
    loss, metrics = bradley_terry_loss(scores, scores, torch.empty(0), torch.empty(0), 0.1)
    loss.backward()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0.0, 0.0]
    assert finalise(metrics) == {}


def test_calibration_by_hand() -> None:
    margins = np.array([math.log(3), math.log(3), -math.log(3), 0.0, math.log(19)], dtype=np.float64)
    result = calibration(margins, num_bins=4)
    # Confidences 0.75 (right, right, wrong), 0.5 (a tie), 0.95; bins of width 1/8 from 0.5. 0.75 is on an
    # edge, so rounding decides which of two bins it is in, and nothing else.
    found = [(round(b.confidence, 9), round(b.accuracy, 9), b.count) for b in result.bins]
    assert found == [(0.5, 0.5, 1), (0.75, round(2 / 3, 9), 3), (0.95, 1.0, 1)]
    assert result.expected_calibration_error == pytest.approx((3 * (0.75 - 2 / 3) + 0.05) / 5)
    assert result.brier_score == pytest.approx((2 * 0.0625 + 0.5625 + 0.25 + 0.0025) / 5)
    expected = -(2 * math.log(0.75) + math.log(0.25) + math.log(0.5) + math.log(0.95)) / 5
    assert result.log_loss == pytest.approx(expected)
    assert result.metrics["reward/brier_score"] == result.brier_score


def test_labels_drawn_from_the_model_are_calibrated_and_exaggerated_ones_are_not() -> None:
    generator = np.random.default_rng(0)
    margins = generator.normal(0, 1.5, 40_000)
    signs = np.where(generator.random(40_000) < 1 / (1 + np.exp(-margins)), 1, -1)
    observed = margins * signs  # margin of the answer that was chosen
    assert calibration(observed).expected_calibration_error < 0.01
    assert calibration(3 * observed).expected_calibration_error > 0.1
    assert calibration(observed).log_loss < calibration(3 * observed).log_loss


def test_log_loss_is_the_training_loss() -> None:
    margins = np.array([-800.0, -1.0, 0.0, 2.0, 700.0])
    scores = torch.from_numpy(margins)
    zeros, ones = torch.zeros_like(scores), torch.ones_like(scores)
    loss, _ = bradley_terry_loss(scores, zeros, zeros, ones)
    assert calibration(margins).log_loss == pytest.approx(loss.item() / 5)


def test_length_baseline_by_hand() -> None:
    assert length_baseline(np.array([5, 3, 4, 9]), np.array([3, 5, 4, 1])) == 0.625


def test_no_pairs_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        calibration(np.empty(0))
    with pytest.raises(ValueError, match="no pairs"):
        length_baseline(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
