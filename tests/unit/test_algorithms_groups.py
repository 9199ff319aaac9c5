"""Advantages without a critic: numbers by hand, and what must not matter to them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algorithms import ALGORITHMS, AdvantageInputs, Advantages
from rlhf_ray.algorithms.advantages import RewardShaping, token_rewards, whiten
from rlhf_ray.algorithms.diagnostics import frac_zero_std, has_signal
from rlhf_ray.algorithms.group_advantages import (
    group_relative,
    is_best_of_group,
    leave_one_out,
    rewards_to_go,
)
from rlhf_ray.algorithms.table import trained_mask
from rlhf_ray.types import offsets_of

ROOT3 = math.sqrt(3)


def groups(*ids: int) -> Tensor:
    return torch.tensor(ids)


def scaled(rewards: Tensor, group_ids: Tensor) -> Tensor:
    return group_relative(rewards, group_ids, scale_by_std=True)


def centred(rewards: Tensor, group_ids: Tensor) -> Tensor:
    return group_relative(rewards, group_ids, scale_by_std=False)


def of(algorithm: str, inputs: AdvantageInputs) -> Advantages:
    return ALGORITHMS[algorithm].advantages(inputs)


def of_tokens(
    rewards: list[float], lengths: list[int], group_ids: Tensor, baseline: Tensor | None = None
) -> AdvantageInputs:
    token_level = torch.tensor(rewards)
    bounds = torch.from_numpy(offsets_of(lengths))
    return AdvantageInputs(token_level, torch.zeros_like(token_level), bounds, group_ids, 1.0, 0.95, baseline)


# group_relative


def test_group_relative_by_hand() -> None:
    """Interleaved groups of 3, 2 and 1: rewards 1, 2, 6 under id 7; 4, 0 under id -2; 9 alone.

    Means 3, 2 and 9. Variances (4 + 1 + 9) / 2 = 7 and (4 + 4) / 1 = 8, with n - 1.
    """
    rewards, ids = torch.tensor([1.0, 4.0, 2.0, 9.0, 0.0, 6.0]), groups(7, -2, 7, 50, -2, 7)
    assert centred(rewards, ids).tolist() == [-2.0, 2.0, -1.0, 0.0, -2.0, 3.0]
    a, b = math.sqrt(7) + 1e-4, math.sqrt(8) + 1e-4
    assert scaled(rewards, ids).tolist() == pytest.approx([-2 / a, 2 / b, -1 / a, 0, -2 / b, 3 / a])


def test_group_relative_of_right_and_wrong() -> None:
    """One right answer of four: mean 1/4, variance (9 + 1 + 1 + 1) / 16 / 3 = 1/4."""
    found = scaled(torch.tensor([0.0, 1.0, 0.0, 0.0]), groups(5, 5, 5, 5))
    assert found.tolist() == pytest.approx([-0.25 / 0.5001, 0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001])


@pytest.mark.parametrize("advantages", [scaled, centred, leave_one_out])
def test_alone_in_the_group_is_a_finite_zero(advantages: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert advantages(torch.tensor([5.0, -1e30, 0.1]), groups(3, 1, 2)).tolist() == [0.0, 0.0, 0.0]
    assert advantages(torch.empty(0), torch.empty(0, dtype=torch.long)).tolist() == []


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3, 1e6, 1 / 3])
@pytest.mark.parametrize("advantages", [scaled, centred])
def test_a_constant_group_is_zero(advantages: Callable[[Tensor, Tensor], Tensor], constant: float) -> None:
    assert advantages(torch.full((7,), constant), torch.zeros(7, dtype=torch.long)).tolist() == [0.0] * 7


@pytest.mark.parametrize(
    "rewards",
    [
        torch.tensor([0.1, 0.1 + 1e-9, 0.1 - 1e-9], dtype=torch.float64),
        torch.tensor([0.1, np.nextafter(np.float32(0.1), np.float32(1)), 0.1]),
        torch.tensor([sum([0.1] * 3), 0.3, 0.1 + 0.2], dtype=torch.float64).float(),
        torch.tensor([1000.0, np.nextafter(np.float32(1000), np.float32(0)), 1000.0]),
    ],
    ids=["1e-9", "one rounding", "sums in another order", "one rounding at 1000"],
)
def test_rounding_is_no_signal(rewards: Tensor) -> None:
    """Divided by its own tiny spread it would be an advantage of about 1."""
    ids = torch.zeros(3, dtype=torch.long)
    assert scaled(rewards, ids).tolist() == [0.0, 0.0, 0.0]
    assert centred(rewards, ids).tolist() == [0.0, 0.0, 0.0]
    assert not has_signal(rewards.numpy(), ids.numpy())[0]


def test_small_differences_are_a_signal() -> None:
    """Only rounding is cut off: 1e-4 apart is a real, if weak, preference."""
    rewards, ids = torch.tensor([0.1, 0.1002], dtype=torch.float64), groups(0, 0)
    std = 1e-4 * math.sqrt(2)
    assert scaled(rewards, ids).tolist() == pytest.approx([-1e-4 / (std + 1e-4), 1e-4 / (std + 1e-4)])
    assert has_signal(rewards.numpy(), ids.numpy())[0]


def test_large_offsets_do_not_eat_the_differences() -> None:
    """float32 represents these exactly; sums of squares in float32 would not."""
    rewards = torch.tensor([65536.0, 65538.0, 65537.0, 0.0, 2.0, 1.0])
    ids = groups(0, 0, 0, 1, 1, 1)
    assert centred(rewards, ids).tolist() == [-1.0, 1.0, 0.0, -1.0, 1.0, 0.0]
    assert scaled(rewards, ids).tolist() == pytest.approx([-1 / 1.0001, 1 / 1.0001, 0.0] * 2)
    assert leave_one_out(rewards, ids).tolist() == [-1.5, 1.5, 0.0] * 2


# leave_one_out


def test_leave_one_out_by_hand() -> None:
    """Id 7: 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2. Id -2: 4 - 0 and 0 - 4."""
    found = leave_one_out(torch.tensor([1.0, 4.0, 2.0, 9.0, 0.0, 6.0]), groups(7, -2, 7, 50, -2, 7))
    assert found.tolist() == [-3.0, 4.0, -1.5, 0.0, -4.0, 4.5]


# is_best_of_group


def test_best_of_group_by_hand_and_the_first_of_equals() -> None:
    rewards, ids = torch.tensor([1.0, 5.0, 3.0, 5.0, 3.0, -9.0, 5.0]), groups(4, 1, 4, 1, 4, 8, 1)
    assert is_best_of_group(rewards, ids).tolist() == [False, True, True, False, False, True, False]
    many = torch.zeros(100)
    assert is_best_of_group(many, torch.zeros(100, dtype=torch.long)).nonzero().tolist() == [[0]]


def test_raft_trains_on_the_tokens_of_the_best() -> None:
    """Sequences of rewards 1 + 1, 3, 0 + 0.5 + 1 (sum 1.5), in groups {0, 2} and {1}."""
    inputs = of_tokens([1.0, 1.0, 3.0, 0.0, 0.5, 1.0], [2, 1, 3], groups(5, 6, 5))
    found = of("raft", inputs)
    assert found.advantages.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert trained_mask(found).tolist() == [True, True, True, False, False, False]


# whole rows of the table


GROUPED = of_tokens([-0.5, 1.5, 3.0, 0.25, 0.25, 0.5, 4.0, 8.0], [2, 1, 3, 1, 1], groups(5, 6, 5, 6, 5))
"""Rewards of whole sequences: 1, 3, 1, 4, 8; in group 5 are 1, 1, 8 (mean 10/3), in group 6 are 3, 4."""
LENGTHS = [2, 1, 3, 1, 1]


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("dr_grpo", [-7 / 3, -0.5, -7 / 3, 0.5, 14 / 3]),
        ("reinforce_pp_baseline", [-7 / 3, -0.5, -7 / 3, 0.5, 14 / 3]),
        ("rloo", [1 - 4.5, -1.0, 1 - 4.5, 1.0, 7.0]),
        # Variance of 1, 1, 8: (49 + 49 + 196) / 9 / 2 = 49/3; of 3, 4: 1/2.
        *[
            (name, [-1 / ROOT3, -1 / math.sqrt(2), -1 / ROOT3, 1 / math.sqrt(2), 2 / ROOT3])
            for name in ("grpo", "dapo", "gspo", "cispo")
        ],
    ],
)
def test_every_token_of_a_row_has_its_advantage(algorithm: str, expected: list[float]) -> None:
    found = of(algorithm, GROUPED)
    tokens = [value for value, length in zip(expected, LENGTHS, strict=True) for _ in range(length)]
    assert found.advantages.tolist() == pytest.approx(tokens, rel=2e-4)
    assert found.returns is None
    assert trained_mask(found).all()


def test_rewards_to_go_by_hand() -> None:
    """1 + 0.5 * 2 + 0.25 * 4 = 3; 2 + 0.5 * 4 = 4; and a row never sees the next one."""
    bounds = torch.tensor([0, 3, 3, 5])
    rewards = torch.tensor([1.0, 2.0, 4.0, -1.0, 8.0])
    assert rewards_to_go(rewards, bounds, gamma=0.5).tolist() == [3.0, 4.0, 4.0, 3.0, 8.0]
    assert rewards_to_go(rewards, bounds, gamma=1.0).tolist() == [7.0, 6.0, 4.0, 7.0, 8.0]


def test_remax_subtracts_the_greedy_reward_at_every_token() -> None:
    """Rewards with the KL taken off along the way: to go, 2 = -0.5 - 0.5 + 3, 2.5, 3; and 1."""
    inputs = of_tokens([-0.5, -0.5, 3.0, 1.0], [3, 1], groups(4, 9), baseline=torch.tensor([1.5, -2.0]))
    assert of("remax", inputs).advantages.tolist() == [0.5, 1.0, 1.5, 3.0]


def test_reinforce_pp_from_scores_to_whitened_advantages() -> None:
    """Hu et al. 2025: A_t = r - beta sum over i >= t of KL(i), then normalised over the batch's tokens."""
    logprobs = torch.tensor([-1.0, -2.0, -1.5, -0.5, -1.0])
    reference = torch.tensor([-1.5, -1.0, -1.5, -0.5, -3.0])
    shaped = token_rewards(
        torch.tensor([2.0, -1.0]),
        torch.tensor([True, True]),
        logprobs,
        reference,
        torch.tensor([0, 3, 5]),
        RewardShaping(kl_coef=0.1),
    )
    inputs = of_tokens(shaped.rewards.tolist(), [3, 2], groups(0, 1))
    raw = of("reinforce_pp", inputs).advantages
    # KLs (0.5, -1, 0) and (0, 2): to go -0.5, -1, 0 and 2, 2.
    expected = [2.05, 2.1, 2.0, -1.2, -1.2]
    assert raw.tolist() == pytest.approx(expected)
    mean = sum(expected) / 5
    std = math.sqrt(sum((x - mean) ** 2 for x in expected) / 4)
    white = whiten(raw, torch.ones(5, dtype=torch.bool))
    assert white.tolist() == pytest.approx([(x - mean) / std for x in expected], rel=1e-5)


# overlong shaping


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0.0), (5, 0.0), (6, 0.0), (7, 0.25), (8, 0.5), (9, 0.75), (10, 1.0)]
)
def test_overlong_penalty_is_equation_13(length: int, penalty: float) -> None:
    """Yu et al. 2025: 0 up to L_max - L_cache = 6, then (6 - |y|) / 4, and -1 at L_max = 10."""
    shaping = RewardShaping(kl_coef=0.0, reward_clip=2.0, overlong_buffer=4, max_length=10)
    shaped = token_rewards(
        torch.tensor([5.0]),
        torch.tensor([False]),
        torch.zeros(length),
        torch.zeros(length),
        torch.tensor([0, length]),
        shaping,
    )
    assert shaped.scores.tolist() == [2.0 - penalty]
    assert shaped.rewards.tolist() == [0.0] * (length - 1) + [2.0 - penalty]


def test_no_buffer_no_penalty() -> None:
    shaping = RewardShaping(kl_coef=0.0, overlong_buffer=0, max_length=3)
    zeros = torch.zeros(3)
    shaped = token_rewards(torch.ones(1), torch.tensor([False]), zeros, zeros, torch.tensor([0, 3]), shaping)
    assert shaped.rewards.tolist() == [0.0, 0.0, 1.0]


# has_signal


def test_signal_by_hand() -> None:
    """Ids in ascending order: 2 has equal rewards, 5 different ones, 9 is alone."""
    rewards, ids = np.array([1, 0, 1, 4, 1], np.float32), np.array([5, 5, 2, 9, 2])
    assert has_signal(rewards, ids).tolist() == [False, True, False]
    assert frac_zero_std(rewards, ids) == 0.5, "the group of one is no comparison"
    assert frac_zero_std(rewards[:2], np.array([1, 2])) is None


# what must not matter

REWARDS = st.lists(
    st.tuples(st.integers(-40, 40).map(lambda x: x / 8), st.integers(0, 4)), min_size=1, max_size=14
)
EACH = pytest.mark.parametrize("advantages", [scaled, centred, leave_one_out], ids=lambda f: f.__name__)


def columns(rows: list[tuple[float, int]]) -> tuple[Tensor, Tensor]:
    return torch.tensor([r for r, _ in rows], dtype=torch.float64), torch.tensor([g for _, g in rows])


@EACH
@settings(max_examples=30, deadline=None)
@given(rows=REWARDS, seed=st.integers(0, 999))
def test_permuted_rows_give_permuted_results(
    advantages: Callable[[Tensor, Tensor], Tensor], rows: list[tuple[float, int]], seed: int
) -> None:
    rewards, ids = columns(rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        advantages(rewards[order], ids[order]), advantages(rewards, ids)[order], rtol=1e-9, atol=1e-12
    )


@EACH
@settings(max_examples=30, deadline=None)
@given(rows=REWARDS, labels=st.permutations([10**12, -3, 0, 77, 4]))
def test_names_of_groups_do_not_matter(
    advantages: Callable[[Tensor, Tensor], Tensor], rows: list[tuple[float, int]], labels: list[int]
) -> None:
    rewards, ids = columns(rows)
    torch.testing.assert_close(
        advantages(rewards, torch.tensor(labels)[ids]), advantages(rewards, ids), rtol=1e-9, atol=1e-12
    )


@EACH
@settings(max_examples=30, deadline=None)
@given(rows=REWARDS, shifts=st.lists(st.integers(-1000, 1000), min_size=5, max_size=5))
def test_a_constant_added_to_a_group_changes_nothing(
    advantages: Callable[[Tensor, Tensor], Tensor], rows: list[tuple[float, int]], shifts: list[int]
) -> None:
    rewards, ids = columns(rows)
    shifted = rewards + torch.tensor(shifts, dtype=torch.float64)[ids]
    torch.testing.assert_close(advantages(shifted, ids), advantages(rewards, ids), rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(rows=REWARDS)
def test_against_plain_python(rows: list[tuple[float, int]]) -> None:
    """And leave-one-out is n / (n - 1) times the centred rewards."""
    rewards, ids = columns(rows)
    expected: dict[str, list[float]] = {"centred": [], "scaled": [], "rloo": []}
    for reward, group in rows:
        same = [r for r, g in rows if g == group]
        n, mean = len(same), sum(same) / len(same)
        std = math.sqrt(sum((r - mean) ** 2 for r in same) / (n - 1)) if n > 1 else 0.0
        expected["centred"].append(reward - mean)
        expected["scaled"].append((reward - mean) / (std + 1e-4))
        expected["rloo"].append((reward - mean) * n / (n - 1) if n > 1 else 0.0)
    assert centred(rewards, ids).tolist() == pytest.approx(expected["centred"], abs=1e-9)
    assert scaled(rewards, ids).tolist() == pytest.approx(expected["scaled"], abs=1e-9)
    assert leave_one_out(rewards, ids).tolist() == pytest.approx(expected["rloo"], abs=1e-9)
    is_best = is_best_of_group(rewards, ids).tolist()
    for group in set(ids.tolist()):
        members = [i for i, (_, g) in enumerate(rows) if g == group]
        assert [i for i in members if is_best[i]] == [max(members, key=lambda i: (rows[i][0], -i))]
