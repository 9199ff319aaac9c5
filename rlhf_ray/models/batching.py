"""From ragged sequences to the rectangles that a model takes, and which rows go together on which rank."""

from __future__ import annotations

import bisect
import heapq
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.types import Ragged


@dataclass(frozen=True)
class TokenBatch:
    """Input of one forward pass, and which of its positions matter.

    Fields:
        input_ids: [b, t] right-padded rows, or one packed row [1, sum of lengths].
        position_ids: [1, sum of lengths], restarting at 0 with each sequence, when packed; else None. No
            attention mask is needed: with right padding a causal model's real tokens never see the padding,
            and packed rows are kept apart by their restarting positions.
        select: [N] indices into the flattened [b * t] positions, in the order of rows and then tokens.
        targets: [N] the token that follows each selected position (0 after a row's last).
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    select: torch.Tensor
    targets: torch.Tensor


def collate(
    sequences: Ragged, is_source: NDArray[np.bool_], packing: bool, device: torch.device
) -> TokenBatch:
    """
    Args:
        sequences: b rows of token ids, int32.
        is_source: [sum of lengths] True at the positions whose hidden state is wanted.

    An empty batch (b = 0) becomes one row of one token with nothing selected: a rank that has no rows left
    must still take part in the forward passes of the others.
    """
    if len(sequences) == 0:
        token = torch.zeros((1, 1), dtype=torch.long, device=device)
        nothing = torch.empty(0, dtype=torch.long, device=device)
        return TokenBatch(token, token if packing else None, nothing, nothing)
    columns = column_ids(sequences)
    ids = sequences.values.astype(np.int64)
    if packing:
        flat, grid = np.arange(len(ids)), ids[None, :]
        position_ids = torch.from_numpy(columns[None, :]).to(device)
    else:
        width = int(sequences.lengths.max())
        flat = sequences.row_ids * width + columns
        padded = np.zeros(len(sequences) * width, dtype=np.int64)
        padded[flat] = ids
        grid, position_ids = padded.reshape(len(sequences), width), None
    following = np.append(ids[1:], 0)
    following[sequences.offsets[1:] - 1] = 0
    return TokenBatch(
        input_ids=torch.from_numpy(grid).to(device),
        position_ids=position_ids,
        select=torch.from_numpy(flat[is_source]).to(device),
        targets=torch.from_numpy(following[is_source]).to(device),
    )


def column_ids(sequences: Ragged) -> NDArray[np.int64]:
    """[sum of lengths] position of each token in its row."""
    return np.arange(len(sequences.values)) - np.repeat(sequences.offsets[:-1], sequences.lengths)


def before_targets(is_target: Ragged) -> NDArray[np.bool_]:
    """[sum of lengths] True at each position that predicts a target: the one before it in the same row.

    A target at a row's first token has no such position and is left out.
    """
    shifted = np.append(is_target.values[1:], False).astype(bool)
    shifted[is_target.offsets[1:] - 1] = False
    return shifted


def before_responses(prompt_lengths: NDArray[np.int64], sequences: Ragged) -> NDArray[np.bool_]:
    """[sum of lengths] True at each position that predicts a token after the row's prompt.

    That is one position a response token.
    """
    is_response = column_ids(sequences) >= np.repeat(prompt_lengths, sequences.lengths)
    return before_targets(sequences.with_values(is_response))


def last_positions(sequences: Ragged) -> NDArray[np.bool_]:
    """[sum of lengths] True at each row's last token, where a score is read."""
    is_last = np.zeros(len(sequences.values), dtype=bool)
    is_last[sequences.offsets[1:] - 1] = True
    return is_last


Plan = list[list[list[int]]]
"""rank -> micro-batch -> rows. Every rank has the same number of micro-batches; some may be empty."""


def plan_micro_batches(lengths: NDArray[np.int64], num_ranks: int, token_budget: int) -> Plan:
    """Group rows of similar length up to a budget of padded tokens, and give every rank an equal share.

    There are as few micro-batches as the budget allows (each costs time whatever its size), and they are as
    equal as that leaves room for. Every rank computes the same plan from the same lengths, so nothing is
    communicated. A row longer than the budget is a micro-batch by itself.
    """
    order = np.argsort(-lengths, kind="stable")
    rounds = -(-len(_cut(order, lengths, token_budget)) // num_ranks)
    fits = bisect.bisect_left(
        range(token_budget), True, key=lambda budget: len(_cut(order, lengths, budget)) <= rounds * num_ranks
    )
    micro_batches = _cut(order, lengths, fits)
    # Longest processing time first: the next heaviest micro-batch goes to the least loaded rank.
    ranks: Plan = [[] for _ in range(num_ranks)]
    heap = [(0, rank) for rank in range(num_ranks)]
    for rows in sorted(micro_batches, key=lambda rows: -int(lengths[rows[0]]) * len(rows)):
        load, rank = heapq.heappop(heap)
        ranks[rank].append(rows)
        heapq.heappush(heap, (load + int(lengths[rows[0]]) * len(rows), rank))
    rounds = max(len(batches) for batches in ranks)
    return [batches + [[]] * (rounds - len(batches)) for batches in ranks]


def _cut(order: NDArray[np.int64], lengths: NDArray[np.int64], budget: int) -> list[list[int]]:
    """Cut rows, in order of falling length, where the next would exceed the budget of padded tokens."""
    micro_batches: list[list[int]] = []
    for row in order:
        longest = lengths[micro_batches[-1][0]] if micro_batches else 0
        if not micro_batches or longest * (len(micro_batches[-1]) + 1) > budget:
            micro_batches.append([])
        micro_batches[-1].append(int(row))
    return micro_batches
