"""Reward shaping, advantages and normalisation against slow references and hand-computed numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algorithms import ALGORITHMS, AdvantageInputs
from rlhf_ray.algorithms.advantages import RewardShaping, RunningMeanStd, gae, token_rewards, whiten
from rlhf_ray.types import offsets_of

NAN = math.nan


def offsets(*lengths: int) -> Tensor:
    return torch.from_numpy(offsets_of(lengths))


def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """One row, by the recursion, in plain Python."""
    if not rewards:
        return []
    following = slow_gae(rewards[1:], values[1:], gamma, lam)
    next_value, next_advantage = (values[1], following[0]) if following else (0.0, 0.0)
    return [rewards[0] + gamma * next_value - values[0] + gamma * lam * next_advantage, *following]


# token_rewards


def test_token_rewards_by_hand() -> None:
    shaped = token_rewards(
        scores=torch.tensor([1.0, 9.0, -9.0]),
        is_finished=torch.tensor([True, False, True]),
        logprobs=torch.tensor([-1.0, -2.0, -3.0, -0.5, -1.0, -1.0]),
        ref_logprobs=torch.tensor([-1.5, -2.0, -2.0, -0.5, -3.0, -1.0]),
        offsets=offsets(3, 1, 2),
        shaping=RewardShaping(kl_coef=0.1, missing_eos_penalty=2.0, reward_clip=5.0),
    )
    assert shaped.scores.tolist() == [
        1.0,
        3.0,
        -5.0,
    ]  # clipped first, so the penalty is felt at the bound too
    assert shaped.kl_penalty.tolist() == pytest.approx([0.05, 0.0, -0.1, 0.0, 0.2, 0.0])
    assert shaped.rewards.tolist() == pytest.approx([-0.05, 0.0, 1.1, 3.0, -0.2, -5.0])


def test_sum_of_token_rewards_is_score_minus_kl() -> None:
    logprobs, reference = -torch.rand(9), -torch.rand(9)
    bounds = offsets(4, 5)
    scores = torch.tensor([0.3, -2.0])
    shaped = token_rewards(
        scores, torch.tensor([True, True]), logprobs, reference, bounds, RewardShaping(0.7)
    )
    for row, score in enumerate(scores.tolist()):
        inside = slice(int(bounds[row]), int(bounds[row + 1]))
        kl = float((logprobs[inside] - reference[inside]).sum())
        assert shaped.rewards[inside].sum().item() == pytest.approx(score - 0.7 * kl, abs=1e-6)


def test_empty_rows_put_their_score_nowhere() -> None:
    shaped = token_rewards(
        torch.tensor([7.0, 1.0, 8.0]),
        torch.tensor([False, True, False]),
        torch.zeros(2),
        torch.zeros(2),
        offsets(0, 2, 0),
        RewardShaping(kl_coef=1.0, missing_eos_penalty=1.0),
    )
    assert shaped.rewards.tolist() == [0.0, 1.0]


def test_without_kl_coefficient_the_reference_does_not_matter() -> None:
    reference = torch.tensor([-math.inf, -1.0])
    one, done = torch.tensor([1.0]), torch.tensor([True])
    shaped = token_rewards(one, done, torch.zeros(2), reference, offsets(2), RewardShaping(kl_coef=0.0))
    assert shaped.rewards.tolist() == [0.0, 1.0]


# gae


def test_gae_by_hand() -> None:
    advantages, returns = gae(
        torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 0.25, 1.0]), offsets(2, 1), gamma=0.5, lam=0.5
    )
    # Row 0: delta_1 = 1 - 0.25 = 0.75; delta_0 = 0.5 * 0.25 - 0.5 = -0.375; A_0 = -0.375 + 0.25 * 0.75.
    assert advantages.tolist() == [-0.1875, 0.75, 1.0]
    assert returns.tolist() == [0.3125, 1.0, 2.0]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), max_size=6),
    gamma=st.floats(0.1, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_gae_agrees_with_the_recursion(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn((2, sum(lengths)), generator=generator, dtype=torch.float64)
    advantages, returns = gae(rewards, values, offsets(*lengths), gamma, lam)
    expected: list[float] = []
    for r, v in zip(rewards.split(lengths), values.split(lengths), strict=True):
        expected += slow_gae(r.tolist(), v.tolist(), gamma, lam)
    assert advantages.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert torch.equal(returns, advantages + values)


def test_junk_in_other_rows_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn((2, 5), generator=generator)
    alone, _ = gae(rewards, values, offsets(5), 0.99, 0.95)
    junk = torch.tensor([NAN, math.inf, 1e30, -math.inf])
    among, _ = gae(
        torch.cat([junk, rewards, junk]), torch.cat([junk, values, junk]), offsets(4, 5, 3, 1), 0.99, 0.95
    )
    assert torch.equal(among[4:9], alone)


def test_with_lambda_one_the_return_is_the_discounted_sum_and_values_cancel() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    _, returns = gae(rewards, torch.tensor([9.0, -3.0, 5.0], dtype=torch.float64), offsets(3), 0.5, 1.0)
    assert returns.tolist() == pytest.approx([1 + 1 + 1, 2 + 2, 4])


def test_table_row_ppo_is_gae() -> None:
    rewards, values, bounds = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 0.25, 1.0]), offsets(2, 1)
    ppo = ALGORITHMS["ppo"]
    found = ppo.advantages(AdvantageInputs(rewards, values, bounds, torch.tensor([4, 7]), 0.5, 0.5))
    assert found.advantages.tolist() == [-0.1875, 0.75, 1.0]
    assert found.returns is not None
    assert found.returns.tolist() == [0.3125, 1.0, 2.0]


# whiten


def test_whiten_by_hand() -> None:
    x, mask = torch.tensor([1.0, NAN, 3.0, 5.0]), torch.tensor([True, False, True, True])
    assert whiten(x, mask).tolist() == pytest.approx(
        [-1.0, 0.0, 0.0, 1.0]
    )  # mean 3, variance (4 + 0 + 4) / 2
    assert whiten(x, mask, shift_mean=False).tolist() == pytest.approx([2.0, 0.0, 3.0, 4.0])


def test_whiten_of_nothing_one_or_a_constant_is_zero() -> None:
    assert whiten(torch.tensor([NAN, 4.0]), torch.tensor([False, False])).tolist() == [0.0, 0.0]
    assert whiten(torch.tensor([NAN, 4.0]), torch.tensor([False, True])).tolist() == [0.0, 0.0]
    assert whiten(torch.full((7,), 0.1), torch.ones(7, dtype=torch.bool)).abs().max() < 1e-6
    assert whiten(torch.empty(0), torch.empty(0, dtype=torch.bool)).tolist() == []


def test_rounding_noise_around_a_constant_is_not_blown_up() -> None:
    noise = 5 + 1e-6 * torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert whiten(noise, torch.ones(100, dtype=torch.bool)).abs().max() < 0.05


def test_whiten_is_invariant_to_scale_shift_and_order() -> None:
    x = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mask = torch.arange(50) % 3 > 0
    white = whiten(x, mask)
    assert white[mask].std().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(whiten(40 * x + 7, mask), white, rtol=1e-6, atol=1e-7)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(whiten(x[order], mask[order]), white[order], rtol=1e-12, atol=1e-14)


# RunningMeanStd


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_running_moments_equal_those_of_everything_seen(sizes: list[int], seed: int) -> None:
    chunks = (
        torch.randn(sum(sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3 + 100
    )
    running = RunningMeanStd()
    for chunk in chunks.split(sizes):
        running.update(chunk)
    assert running.count == sum(sizes)
    if running.count > 1:
        assert running.mean == pytest.approx(float(np.mean(chunks.numpy())), rel=1e-12)
        assert running.std == pytest.approx(float(np.std(chunks.numpy(), ddof=1)), rel=1e-9)


def test_running_scale_by_hand() -> None:
    running = RunningMeanStd()
    running.update(torch.tensor([3.0, 3.0]))
    assert running.scale(torch.tensor([6.0])).tolist() == [6.0]  # a constant has no scale
    running.update(torch.tensor([5.0, 5.0]))  # mean 4, variance 4 / 3
    assert running.scale(torch.tensor([6.0])).item() == pytest.approx(6 / math.sqrt(4 / 3))


def test_running_moments_survive_json() -> None:
    running, resumed = RunningMeanStd(), RunningMeanStd()
    running.update(torch.tensor([1.0, 2.5, 9.0]))
    resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
    for each in (running, resumed):
        each.update(torch.tensor([0.1, 0.2]))
    assert resumed.state_dict() == running.state_dict()


def test_running_moments_refuse_nan() -> None:
    running = RunningMeanStd()
    with pytest.raises(ValueError, match="NaN or infinite"):
        running.update(torch.tensor([1.0, NAN]))
    assert running.count == 0
