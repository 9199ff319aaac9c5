"""Advantages without a critic: an answer is compared with others, mostly with those to the same prompt.

Groups are told by their id, never by position, and may be of different sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.algorithms.advantages import gae
from rlhf_ray.algorithms.diagnostics import RELATIVE_SPREAD
from rlhf_ray.algorithms.rows import row_ids_of

STD_FLOOR = 1e-4
"""Added to the spread of a group before it divides, as is usual."""


@dataclass(frozen=True)
class Groups:
    """Rows by prompt.

    Fields:
        index: [B] int64, 0 .. G - 1, the group of each row. sizes: [G] int64.
    """

    index: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, group_ids: Tensor) -> Groups:
        _, index, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
        return cls(index, sizes)

    def sums(self, x: Tensor) -> Tensor:
        """[B] of each row's group."""
        return x.new_zeros(len(self.sizes)).index_add(0, self.index, x)[self.index]

    def means(self, x: Tensor) -> Tensor:
        return self.sums(x) / self.num_rows

    @property
    def num_rows(self) -> Tensor:
        """[B] rows in each row's group."""
        return self.sizes[self.index]


def group_relative(rewards: Tensor, group_ids: Tensor, scale_by_std: bool) -> Tensor:
    """(r - mean of the group) / (standard deviation of the group + 1e-4): Shao et al. 2024, section 4.1.2.

    Without the division it is that of Liu et al. 2025, equation 4. The standard deviation has n - 1 in its
    denominator. 0 where a group is of one row, or constant up to rounding.

    Args:
        rewards: [B] of whole sequences. group_ids: [B].
    """
    groups = Groups.of(group_ids)
    wide = rewards.double()
    centred = wide - groups.means(wide)
    std = (groups.sums(centred.square()) / (groups.num_rows - 1).clamp(min=1)).sqrt()
    size = groups.means(wide.abs()).clamp(min=1.0)
    has_signal = std > RELATIVE_SPREAD * size
    advantages = torch.where(has_signal, centred, 0.0)
    if scale_by_std:
        advantages = advantages / (std + STD_FLOOR)
    return advantages.to(rewards.dtype)


def leave_one_out(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """r minus the mean of the others in its group: Ahmadian et al. 2024, equation 9. A row alone gets 0.

    Args:
        rewards: [B] of whole sequences. group_ids: [B].
    """
    groups = Groups.of(group_ids)
    wide = rewards.double()
    others = (groups.num_rows - 1).clamp(min=1)
    advantages = wide - (groups.sums(wide) - wide) / others
    return torch.where(groups.num_rows > 1, advantages, 0.0).to(rewards.dtype)


def is_best_of_group(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[B] bool, True for one row a group: that of the highest reward, the first of several.

    Args:
        rewards: [B] of whole sequences. group_ids: [B].
    """
    is_best = torch.zeros(len(rewards), dtype=torch.bool)
    for group in torch.unique(group_ids):
        rows = torch.nonzero(group_ids == group).flatten()
        is_best[rows[int(torch.argmax(rewards[rows]))]] = True
    return is_best


def rewards_to_go(rewards: Tensor, offsets: Tensor, gamma: float) -> Tensor:
    """[R] discounted sum of a token's reward and those after it.

    Args:
        rewards: [R]; offsets: [B + 1].
    """
    return gae(rewards, torch.zeros_like(rewards), offsets, gamma, lam=1.0)[0]


def on_every_token(per_row: Tensor, offsets: Tensor) -> Tensor:
    """[R] each row's value [B] at all of its tokens."""
    return per_row[row_ids_of(offsets)]
