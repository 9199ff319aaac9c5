"""Importance weights between sampler and trainer, at every level and in every mode."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.correction import (
    Correction,
    Level,
    Mode,
    correction_metrics,
    importance_weights,
    remaining_weights,
)
from rlhf_ray.algorithms.metrics import finalise

# Rows of 3, 2, 0 and 1 tokens; the second token of the first row is not trained.
OFFSETS = torch.tensor([0, 3, 5, 5, 6])
IS_TRAINED = torch.tensor([True, False, True, True, True, True])
RATIOS = torch.tensor([4.0, math.nan, 0.25, 3.0, 1.0, 0.4], dtype=torch.float64)
SAMPLER = torch.tensor([-2.0, -1.0, -0.5, -3.0, -1.0, -0.1], dtype=torch.float64)
TRAINER = SAMPLER + RATIOS.log()
# Products: 4 / 4 = 1, 3, 0.4. Geometric means: 1, sqrt(3), 0.4.
ROOT3 = math.sqrt(3)


def weights(level: Level, mode: Mode, cap: float = 2.0) -> list[float]:
    return importance_weights(TRAINER, SAMPLER, OFFSETS, IS_TRAINED, Correction(level, mode, cap)).tolist()


def remaining(level: Level, mode: Mode, cap: float = 2.0) -> list[float]:
    return remaining_weights(TRAINER, SAMPLER, OFFSETS, IS_TRAINED, Correction(level, mode, cap)).tolist()


@pytest.mark.parametrize(
    ("level", "mode", "cap", "expected"),
    [
        ("token", "truncate", 2.0, [2, 1, 0.25, 2, 1, 0.4]),
        ("token", "truncate", 3.5, [3.5, 1, 0.25, 3, 1, 0.4]),
        ("token", "mask", 2.0, [0, 1, 0, 0, 1, 0]),
        ("token", "mask", 3.5, [0, 1, 0, 3, 1, 0.4]),
        ("sequence", "truncate", 2.0, [1, 1, 1, 2, 2, 0.4]),
        ("sequence", "mask", 2.0, [1, 1, 1, 0, 0, 0]),
        ("sequence", "mask", 3.5, [1, 1, 1, 3, 3, 0.4]),
        ("geometric", "mask", 2.0, [1, 1, 1, 1, 1, 0]),
        ("geometric", "mask", 1.5, [1, 1, 1, 0, 0, 0]),
        ("geometric", "truncate", 1.5, [1, 1, 1, 1.5, 1.5, 0.4]),
    ],
)
def test_weights_by_hand(level: Level, mode: Mode, cap: float, expected: list[float]) -> None:
    assert weights(level, mode, cap) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("level", "mode", "cap", "expected"),
    [
        ("token", "truncate", 2.0, [0.5, 1, 1, 2 / 3, 1, 1]),
        ("token", "mask", 3.5, [0, 1, 0, 1, 1, 1]),
        ("sequence", "truncate", 2.0, [1, 1, 1, 2 / 3, 2 / 3, 1]),
        ("sequence", "mask", 2.0, [1, 1, 1, 0, 0, 0]),
        ("geometric", "mask", 1.5, [1, 1, 1, 0, 0, 0]),
    ],
)
def test_remaining_weights_by_hand(level: Level, mode: Mode, cap: float, expected: list[float]) -> None:
    assert remaining(level, mode, cap) == pytest.approx(expected)


def test_bounds_of_a_mask_belong_to_what_is_kept() -> None:
    sampler = torch.zeros(4, dtype=torch.float64)
    trainer = torch.tensor([2.0, 0.5, 2.0001, 0.4999], dtype=torch.float64).log()
    bounds, trained = torch.tensor([0, 4]), torch.ones(4, dtype=torch.bool)
    found = importance_weights(trainer, sampler, bounds, trained, Correction("token", "mask", 2.0))
    assert found.tolist() == pytest.approx([2.0, 0.5, 0.0, 0.0])


LOG_RATIOS = st.lists(st.floats(-4, 4), min_size=1, max_size=9)


@settings(max_examples=50, deadline=None)
@given(log_ratios=LOG_RATIOS, mode=st.sampled_from(["truncate", "mask"]), cap=st.floats(1.1, 6))
def test_ratio_times_what_remains_is_the_corrected_ratio(
    log_ratios: list[float], mode: Mode, cap: float
) -> None:
    """Per token, and per sequence for the ratio of a sequence."""
    trainer = torch.tensor(log_ratios, dtype=torch.float64)
    sampler, trained = torch.zeros_like(trainer), torch.ones_like(trainer, dtype=torch.bool)
    bounds = torch.tensor([0, len(trainer)])
    levels: tuple[Level, ...] = ("token", "sequence")
    for level, ratio in zip(levels, (trainer.exp(), trainer.sum().clamp(-20, 20).exp()), strict=True):
        arguments = (trainer, sampler, bounds, trained, Correction(level, mode, cap))
        torch.testing.assert_close(ratio * remaining_weights(*arguments), importance_weights(*arguments))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_long_sequences_do_not_overflow(level: Level, mode: Mode, sign: float) -> None:
    """4000 tokens that are off by 0.5 nats: a product of e^2000 in one direction or the other."""
    trainer = torch.full((4000,), sign * 0.5)
    arguments = (trainer, torch.zeros(4000), torch.tensor([0, 4000]), torch.ones(4000, dtype=torch.bool))
    spec = Correction(level, mode, 2.0)
    found, left = importance_weights(*arguments, spec), remaining_weights(*arguments, spec)
    assert found.isfinite().all()
    assert left.isfinite().all()
    expected = {
        ("sequence", "truncate", 1.0): 2.0,
        ("sequence", "truncate", -1.0): 0.0,
        ("sequence", "mask", 1.0): 0.0,
        ("sequence", "mask", -1.0): 0.0,
        ("geometric", "mask", 1.0): 1.0,
        ("geometric", "mask", -1.0): 1.0,
    }.get((level, mode, sign), math.exp(sign * 0.5))
    torch.testing.assert_close(found, torch.full((4000,), expected), rtol=1e-6, atol=1e-8)


def test_small_differences_add_up_in_float64() -> None:
    """float32 log-probs that are off by 1e-4 over 10 000 tokens: e^1, not what rounding makes of it."""
    sampler = -torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    trainer = sampler + 1e-4
    arguments = (trainer, sampler, torch.tensor([0, 10_000]), torch.ones(10_000, dtype=torch.bool))
    found = importance_weights(*arguments, Correction("sequence", "truncate", 10.0))
    exact = math.exp((trainer.double() - sampler.double()).sum().item())
    assert found.tolist() == pytest.approx([exact] * 10_000, rel=1e-4)


def test_weights_are_constants_in_the_dtype_of_the_trainer() -> None:
    trainer = torch.zeros(2, requires_grad=True)
    arguments = (trainer, -torch.ones(2), torch.tensor([0, 2]), torch.ones(2, dtype=torch.bool))
    for function in (importance_weights, remaining_weights):
        found = function(*arguments, Correction("token", "truncate", 2.0))
        assert (found.requires_grad, found.dtype) == (False, torch.float32)


def test_rows_without_trained_tokens_and_no_rows_at_all() -> None:
    nothing = torch.empty(0)
    spec = Correction("geometric", "mask", 2.0)
    none = importance_weights(nothing, nothing, torch.tensor([0]), nothing.bool(), spec)
    assert none.tolist() == []
    untrained = torch.zeros(2, dtype=torch.bool)
    junk = torch.full((2,), math.nan)
    assert importance_weights(junk, junk, torch.tensor([0, 2]), untrained, spec).tolist() == [1.0, 1.0]


def test_metrics_by_hand() -> None:
    """Over the five trained tokens: weights 0, 0, 3, 1, 0.4; the untrained 1 does not count."""
    found = torch.tensor(weights("token", "mask", 3.5))
    assert finalise(correction_metrics(found, IS_TRAINED)) == pytest.approx(
        {"mismatch/weight_mean": 4.4 / 5, "mismatch/fraction_masked": 2 / 5}
    )
