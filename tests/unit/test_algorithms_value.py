"""The value loss."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.metrics import finalise
from rlhf_ray.algorithms.value_losses import ValueTokens, value_loss


def random_tokens(num_tokens: int) -> ValueTokens:
    values, change, returns = torch.randn(
        (3, num_tokens), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    weights = torch.ones(num_tokens, dtype=torch.float64)
    return ValueTokens(values, values - 0.3 * change, returns, weights)


def test_by_hand() -> None:
    tokens = ValueTokens(
        values=torch.tensor([1.0, 1.0, 1.0, 0.1], requires_grad=True),
        old_values=torch.zeros(4),
        returns=torch.tensor([2.0, 0.0, 0.5, 0.3]),
        weights=torch.ones(4),
    )
    loss, metrics = value_loss(tokens, cliprange_value=0.25)
    # Squares (1, 1, 0.25, 0.04) against clipped (1.75^2, 0.25^2, 0.25^2, the same).
    assert loss.item() == pytest.approx(0.5 * (1.75**2 + 1 + 0.25 + 0.04), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, tokens.values)
    assert gradient.tolist() == pytest.approx([0.0, 1.0, 0.5, -0.2], rel=1e-5)
    values = finalise(metrics)
    assert values["critic/loss"] == pytest.approx(0.5 * (1.75**2 + 1.29) / 4, rel=1e-6)
    assert values["critic/clip_fraction"] == 0.25
    assert values["critic/value_mean"] == pytest.approx(3.1 / 4)
    assert values["critic/return_mean"] == pytest.approx(2.8 / 4)
    targets, predictions = np.array([2, 0, 0.5, 0.3]), np.array([1, 1, 1, 0.1])
    explained = 1 - np.var(targets - predictions) / np.var(targets)
    assert values["critic/explained_variance"] == pytest.approx(explained, rel=1e-6)


def test_without_clipping_it_is_half_the_squared_error() -> None:
    tokens = random_tokens(50)
    loss, metrics = value_loss(tokens, None)
    assert loss.item() == pytest.approx(0.5 * (tokens.values - tokens.returns).square().sum().item())
    assert finalise(metrics)["critic/clip_fraction"] == 0.0


def test_agrees_with_plain_python() -> None:
    tokens = replace(random_tokens(50), weights=torch.arange(50, dtype=torch.float64) % 3)
    expected = 0.0
    columns = (tokens.values, tokens.old_values, tokens.returns, tokens.weights)
    for v, old, target, weight in zip(*(column.tolist() for column in columns), strict=True):
        clipped = min(max(v, old - 0.2), old + 0.2)
        expected += weight * 0.5 * max((v - target) ** 2, (clipped - target) ** 2)
    assert value_loss(tokens, 0.2)[0].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("cliprange_value", [None, 0.2])
def test_gradients_are_right(cliprange_value: float | None) -> None:
    tokens = random_tokens(20)

    def loss_of(values: Tensor) -> Tensor:
        return value_loss(replace(tokens, values=values), cliprange_value)[0]

    assert torch.autograd.gradcheck(loss_of, (tokens.values.clone().requires_grad_(),))


@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_junk_at_untrained_tokens_changes_nothing(junk: float) -> None:
    clean = random_tokens(6)
    is_trained = torch.tensor([True, False, True, True, False, True])
    values, old, returns = (
        torch.where(is_trained, column, junk) for column in (clean.values, clean.old_values, clean.returns)
    )
    values.requires_grad_()
    loss, metrics = value_loss(ValueTokens(values, old, returns, is_trained.double()), 0.2)
    few = ValueTokens(
        clean.values[is_trained], clean.old_values[is_trained], clean.returns[is_trained], torch.ones(4)
    )
    loss_of_few, metrics_of_few = value_loss(few, 0.2)
    assert loss.item() == pytest.approx(loss_of_few.item(), rel=1e-12)
    assert finalise(metrics) == pytest.approx(finalise(metrics_of_few), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, values)
    assert torch.isfinite(gradient).all()
    assert gradient[~is_trained].tolist() == [0.0, 0.0]


def test_an_empty_micro_batch_is_a_zero_with_a_gradient() -> None:
    parameter = torch.ones(3, requires_grad=True)
    nothing = torch.empty(0)
    loss, metrics = value_loss(ValueTokens(torch.empty((0, 3)) @ parameter, nothing, nothing, nothing), 0.2)
    loss.backward()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0.0, 0.0, 0.0]
    assert finalise(metrics) == {}
