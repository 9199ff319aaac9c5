"""Flat token tensors [R] and the rows they belong to: the few index tricks that the other modules share.

`offsets` [B + 1] int64 starts at 0 and ends at R; row i holds the tokens `offsets[i]:offsets[i + 1]` and may
be empty.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_ids_of(offsets: Tensor) -> Tensor:
    """[R] int64, the row of each token."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff())


def row_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """[B] sum of each row's values [R]; 0 for an empty row."""
    sums = values.new_zeros(len(offsets) - 1)
    return sums.index_add(0, row_ids_of(offsets), values)


def where_trained(values: Tensor, is_trained: Tensor) -> Tensor:
    """Zero at untrained tokens, whatever stood there.

    To be applied to inputs, before any arithmetic: `NaN * 0` is NaN, forwards and in the gradient.
    """
    return torch.where(is_trained, values, torch.zeros_like(values))
