"""Forward passes without gradients over any number of ragged rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.config.schema import Layout
from rlhf_ray.models.batching import TokenBatch, collate
from rlhf_ray.types import Ragged

Forward = Callable[[TokenBatch], torch.Tensor]
"""TokenBatch with N selected positions -> [N]."""


def forward_rows(
    forward: Forward,
    sequences: Ragged,
    is_source: NDArray[np.bool_],
    micro_batches: Iterable[list[int]],
    layout: Layout,
    device: torch.device,
    prompts: Ragged | None = None,
) -> dict[int, NDArray[np.float32]]:
    """Row -> the values of its selected positions, for every row that a micro-batch names.

    Args:
        prompts: as in `collate`.
    """
    selection = sequences.with_values(is_source)
    found: dict[int, NDArray[np.float32]] = {}
    for rows in micro_batches:
        chosen = selection.select(rows)
        own = None if prompts is None else prompts.select(rows)
        batch = collate(sequences.select(rows), chosen.values.astype(bool), layout, device, own)
        with torch.no_grad():
            values = forward(batch).float().cpu().numpy()
        counts = [int(row.sum()) for row in chosen]
        found.update(zip(rows, np.split(values, np.cumsum(counts)[:-1]), strict=True) if rows else ())
    return found


def row_totals(rows: Ragged) -> NDArray[np.float32]:
    """[B] sum of each row."""
    return np.bincount(rows.row_ids, weights=rows.values, minlength=len(rows)).astype(np.float32)


def in_row_order(parts: Iterable[dict[int, NDArray[np.float32]]]) -> Ragged:
    """The parts of several ranks as one batch in the original order."""
    everything = {row: values for part in parts for row, values in part.items()}
    return Ragged.from_rows([everything[row] for row in range(len(everything))], np.float32)
