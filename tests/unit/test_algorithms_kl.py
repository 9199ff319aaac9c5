"""Estimators of the KL against exact enumeration, and the two controllers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.kl import (
    AdaptiveKLController,
    Estimator,
    FixedKLController,
    kl_per_token,
    reference_kl_metrics,
)
from rlhf_ray.algorithms.metrics import finalise
from rlhf_ray.errors import CheckpointError, ConfigError

ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3")
REFERENCE = torch.log_softmax(torch.tensor([0.5, -1.0, 0.2, 1.4], dtype=torch.float64), dim=0)


def policy_logits() -> Tensor:
    return torch.tensor([0.1, 0.3, -0.7, 0.9], dtype=torch.float64, requires_grad=True)


def exact_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.sum(log_p.exp() * (log_p - log_q))


def expected_estimate(estimator: Estimator, logits: Tensor) -> Tensor:
    """The mean over samples from the policy, each token weighted by its (constant) probability."""
    log_p = torch.log_softmax(logits, dim=0)
    return torch.sum(log_p.exp().detach() * kl_per_token(log_p, REFERENCE, estimator))


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits)[0]


def test_values_by_hand() -> None:
    logprobs, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.5, -2.0])
    difference = [0.0, 0.5, -1.0]
    assert kl_per_token(logprobs, reference, "k1").tolist() == difference
    assert kl_per_token(logprobs, reference, "k2").tolist() == [0.0, 0.125, 0.5]
    k3 = [math.exp(-d) - 1 + d for d in difference]
    assert kl_per_token(logprobs, reference, "k3").tolist() == pytest.approx(k3, rel=1e-6)


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    logits = policy_logits()
    exact = exact_kl(torch.log_softmax(logits, 0), REFERENCE).item()
    assert expected_estimate("k1", logits).item() == pytest.approx(exact, rel=1e-12)
    assert expected_estimate("k3", logits).item() == pytest.approx(exact, rel=1e-12)
    assert abs(expected_estimate("k2", logits).item() - exact) > 1e-3


def test_gradient_of_k1_vanishes() -> None:
    logits = policy_logits()
    assert gradient(expected_estimate("k1", logits), logits).abs().max() < 1e-15


def test_gradient_of_k2_is_that_of_the_kl_to_the_reference() -> None:
    logits = policy_logits()
    exact = gradient(exact_kl(torch.log_softmax(logits, 0), REFERENCE), logits)
    torch.testing.assert_close(
        gradient(expected_estimate("k2", logits), logits), exact, rtol=1e-12, atol=1e-15
    )


def test_gradient_of_k3_is_that_of_the_other_direction() -> None:
    logits = policy_logits()
    exact = gradient(exact_kl(REFERENCE, torch.log_softmax(logits, 0)), logits)
    torch.testing.assert_close(
        gradient(expected_estimate("k3", logits), logits), exact, rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_descending_the_estimate_leads_to_the_reference(estimator: Estimator) -> None:
    """Guards the sign: minimising the KL term brings the policy nearer."""
    logits = policy_logits()
    for _ in range(400):
        logits = (logits - gradient(expected_estimate(estimator, logits), logits)).detach().requires_grad_()
    assert exact_kl(torch.log_softmax(logits, 0), REFERENCE).item() < 1e-6


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_have_no_kl(estimator: Estimator) -> None:
    logprobs = -torch.rand(50) * 20
    assert torch.equal(kl_per_token(logprobs, logprobs.clone(), estimator), torch.zeros(50))


def test_k3_of_a_tiny_difference_is_not_rounded_away() -> None:
    k3 = kl_per_token(torch.tensor([1e-3], dtype=torch.float32), torch.zeros(1), "k3").item()
    assert k3 == pytest.approx(5e-7, rel=1e-3)


def test_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="kl_estimator=k4"):
        kl_per_token(REFERENCE, REFERENCE, "k4")  # type: ignore[arg-type]


def test_reference_metrics_by_hand() -> None:
    logprobs, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.5, -2.0])
    values = finalise(reference_kl_metrics(logprobs, reference, torch.tensor([0, 2, 2, 3])))
    assert values["kl/per_token"] == pytest.approx(0.0)
    assert values["kl/per_sequence"] == pytest.approx((1.0 + 0.0 - 1.0) / 3)
    k3 = (2 * (math.exp(-0.5) - 0.5) + math.e - 2) / 3
    assert values["kl/per_token_k3"] == pytest.approx(k3, rel=1e-6)


def test_adaptive_controller_by_hand() -> None:
    controller = AdaptiveKLController(coef=0.1, target=6.0, horizon=1000)
    controller.update(observed_kl=6.6, num_samples=100)  # error 0.1
    assert controller.coef == pytest.approx(0.1 * 1.01)
    controller.update(observed_kl=60.0, num_samples=100)  # error clipped to 0.2
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.02)
    controller.update(observed_kl=-3.0, num_samples=500)  # error clipped to -0.2
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.02 * 0.9)


def test_adaptive_controller_holds_a_target() -> None:
    """A system whose KL is 1 / coef settles at coef = 1 / target."""
    controller = AdaptiveKLController(coef=1.0, target=4.0, horizon=100)
    for _ in range(300):
        controller.update(observed_kl=1 / controller.coef, num_samples=30)
    assert controller.coef == pytest.approx(0.25, rel=1e-3)


def test_adaptive_controller_resumes() -> None:
    controller = AdaptiveKLController(0.1, 6.0, 1000)
    controller.update(9.0, 100)
    resumed = AdaptiveKLController(0.1, 6.0, 1000)
    resumed.load_state_dict(controller.state_dict())
    controller.update(1.0, 100)
    resumed.update(1.0, 100)
    assert resumed.coef == controller.coef != 0.1


def test_controller_refuses_what_would_ruin_it() -> None:
    controller = AdaptiveKLController(0.1, 6.0, horizon=10)
    with pytest.raises(ConfigError, match=r"online\.kl_horizon=10: with 64 samples .* use more than 13"):
        controller.update(1.0, 64)
    with pytest.raises(ValueError, match="nan"):
        controller.update(math.nan, 1)
    assert controller.coef == 0.1


def test_fixed_controller_does_not_move() -> None:
    controller = FixedKLController(0.05)
    controller.update(100.0, 64)
    controller.load_state_dict(controller.state_dict())
    assert controller.coef == 0.05


def test_state_of_the_other_kind_is_an_error() -> None:
    fixed, adaptive = FixedKLController(0.1), AdaptiveKLController(0.1, 6.0, 1000)
    with pytest.raises(CheckpointError, match=r"online\.kl_target=null"):
        fixed.load_state_dict(adaptive.state_dict())
    with pytest.raises(CheckpointError, match=r"online\.kl_target=6\.0"):
        adaptive.load_state_dict(fixed.state_dict())
