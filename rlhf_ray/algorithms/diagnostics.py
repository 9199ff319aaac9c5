"""Signs, over a whole batch of rollouts, that the reward is gamed or says nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RELATIVE_SPREAD = 1e-6
"""Numbers that differ by less than this, relative to their size, are taken as equal: float32 rounding."""


def reward_length_correlation(rewards: NDArray[np.floating], lengths: NDArray[np.integer]) -> float | None:
    """Pearson correlation over samples; None where there is none, since one of the two is constant.

    Args:
        rewards: [B]; lengths: [B] response tokens.
    """
    if _is_constant(rewards) or _is_constant(lengths):
        return None
    return float(np.corrcoef(rewards.astype(np.float64), lengths.astype(np.float64))[0, 1])


def frac_zero_std(rewards: NDArray[np.floating], group_ids: NDArray[np.int64]) -> float | None:
    """Fraction of groups whose samples all got the same reward, and so teach nothing by comparison.

    Groups of one sample have no spread and do not count; None where no group has two.

    Args:
        rewards: [B]; group_ids: [B] prompt of each sample, in any order.
    """
    is_comparison = np.unique(group_ids, return_counts=True)[1] > 1
    if not is_comparison.any():
        return None
    return float(1 - has_signal(rewards, group_ids)[is_comparison].mean())


def has_signal(rewards: NDArray[np.floating], group_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[G] in the order of ascending id: whether the samples of a group got different rewards.

    Args:
        rewards: [B]; group_ids: [B] prompt of each sample, in any order.
    """
    groups = [rewards[group_ids == group] for group in np.unique(group_ids)]
    return np.array([not _is_constant(group) for group in groups], dtype=np.bool_)


def _is_constant(x: NDArray[np.number]) -> bool:
    if len(x) < 2:
        return True
    return float(np.ptp(x)) <= RELATIVE_SPREAD * max(1.0, float(np.abs(x).max()))
