"""Supervised loss, mismatch metrics and diagnostics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms.diagnostics import frac_zero_std, reward_length_correlation
from rlhf_ray.algorithms.metrics import finalise
from rlhf_ray.algorithms.mismatch import mismatch_metrics
from rlhf_ray.algorithms.supervised_losses import next_token_loss


def test_next_token_loss_equals_cross_entropy() -> None:
    logits = torch.randn((9, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    targets = torch.arange(9) % 5
    logprobs = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    loss, metrics = next_token_loss(logprobs, logits.argmax(-1) == targets)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))
    mean = expected.item() / 9
    accuracy = float((logits.argmax(-1) == targets).double().mean())
    assert finalise(metrics) == pytest.approx(
        {"sft/loss": mean, "sft/perplexity": math.exp(mean), "sft/token_accuracy": accuracy}, rel=1e-12
    )


def test_next_token_loss_of_no_targets() -> None:
    loss, metrics = next_token_loss(torch.empty(0, requires_grad=True), torch.empty(0, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert finalise(metrics) == {}


def test_perplexity_too_large_for_a_float_is_infinite() -> None:
    _, metrics = next_token_loss(torch.tensor([-1000.0]), torch.tensor([False]))
    assert finalise(metrics)["sft/perplexity"] == math.inf


def test_mismatch_by_hand() -> None:
    trainer = torch.tensor([-1.0, -2.0, math.nan, -3.0], dtype=torch.float64)
    sampler = torch.tensor([-1.5, -2.0, -1.0, -2.0], dtype=torch.float64)
    values = finalise(mismatch_metrics(trainer, sampler, torch.tensor([True, True, False, True])))
    d = [0.5, 0.0, -1.0]
    assert values == pytest.approx(
        {
            "mismatch/logprob_diff_mean": 0.5,
            "mismatch/logprob_diff_max": 1.0,
            "mismatch/kl": sum(math.exp(x) - 1 - x for x in d) / 3,
            "mismatch/ratio_min": math.exp(-1),
            "mismatch/ratio_mean": sum(math.exp(x) for x in d) / 3,
            "mismatch/ratio_max": math.exp(0.5),
            "mismatch/fraction_masked": 0.25,
        }
    )


def test_equal_logprobs_do_not_mismatch() -> None:
    logprobs = -torch.rand(20)
    values = finalise(mismatch_metrics(logprobs, logprobs.clone(), torch.ones(20, dtype=torch.bool)))
    assert values == {
        "mismatch/logprob_diff_mean": 0.0,
        "mismatch/logprob_diff_max": 0.0,
        "mismatch/kl": 0.0,
        "mismatch/ratio_min": 1.0,
        "mismatch/ratio_mean": 1.0,
        "mismatch/ratio_max": 1.0,
        "mismatch/fraction_masked": 0.0,
    }


def test_correlation_by_hand() -> None:
    # Deviations (-2, 0, 2) and (-1, 1, 0): -2 + 0 ... = 2 / sqrt(8 * 2).
    assert reward_length_correlation(np.array([1.0, 3.0, 5.0]), np.array([2, 4, 3])) == pytest.approx(0.5)
    rewards = np.array([1e9, 1e9 + 64, 1e9 + 128], dtype=np.float64)
    assert reward_length_correlation(np.array([1.0, 2.0]), np.array([9, 3])) == pytest.approx(-1.0)
    assert reward_length_correlation(rewards, np.array([1, 2, 3])) is None  # equal to six digits


@pytest.mark.parametrize(
    ("rewards", "lengths"), [([], []), ([1.0], [3]), ([1.0, 1.0], [3, 4]), ([1.0, 2.0], [3, 3])]
)
def test_correlation_with_a_constant_is_none(rewards: list[float], lengths: list[int]) -> None:
    assert reward_length_correlation(np.array(rewards), np.array(lengths, dtype=np.int64)) is None


def test_groups_without_signal_by_hand() -> None:
    # Group 5: 1, 1. Group 2: 0.1 + rounding. Group 9: 0, 1. Group 7: one sample.
    group_ids = np.array([5, 2, 9, 7, 2, 9, 5, 2])
    rewards = np.array([1.0, 0.1, 0.0, 4.0, 0.1 + 1e-9, 1.0, 1.0, 0.1], dtype=np.float32)
    assert frac_zero_std(rewards, group_ids) == pytest.approx(2 / 3)


def test_groups_of_one_have_no_spread_to_speak_of() -> None:
    assert frac_zero_std(np.array([1.0, 2.0]), np.array([0, 1])) is None
    assert frac_zero_std(np.empty(0), np.empty(0, dtype=np.int64)) is None
