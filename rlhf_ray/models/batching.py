"""From ragged sequences to the rectangles that a model takes, and which rows go together on which rank."""

from __future__ import annotations

import bisect
import heapq
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.config.schema import Layout
from rlhf_ray.types import Ragged
from rlhf_ray.types.ragged import Array


@dataclass(frozen=True)
class TokenBatch:
    """Input of one forward pass, and which of its positions matter.

    Fields:
        input_ids: [b, t] right-padded rows, or one packed row [1, sum of lengths].
        position_ids: like input_ids, where rows hold several sequences; else None. In a packed row they
            restart at 0 with each sequence; behind a shared prompt each answer goes on from it. No attention
            mask is needed but for shared prompts: with right padding a causal model's real tokens never see
            the padding, and packed rows are kept apart by their restarting positions.
        select: [N] indices into the flattened [b * t] positions, in the order of sequences and then tokens.
        targets: [N] the token that follows each selected position (0 after a sequence's last).
        answer_ids: like input_ids, where prompts are shared: 0 in the prompt, else the number of the answer.
            A token sees the prompt and its own answer.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    select: torch.Tensor
    targets: torch.Tensor
    answer_ids: torch.Tensor | None = None


def collate(
    sequences: Ragged,
    is_source: NDArray[np.bool_],
    layout: Layout,
    device: torch.device,
    prompts: Ragged | None = None,
) -> TokenBatch:
    """
    Args:
        sequences: b rows of token ids, int32.
        is_source: [sum of lengths] True at the positions whose hidden state is wanted.
        prompts: b rows, the beginnings of the sequences, for the layout `shared`; where there are none, or no
            two are equal, that is `padded`.

    An empty batch (b = 0) becomes one row of one token with nothing selected: a rank that has no rows left
    must still take part in the forward passes of the others.
    """
    if len(sequences) == 0:
        token = torch.zeros((1, 1), dtype=torch.long, device=device)
        nothing = torch.empty(0, dtype=torch.long, device=device)
        return TokenBatch(token, token if layout == "packed" else None, nothing, nothing)
    following = np.append(sequences.values[1:], 0).astype(np.int64)
    following[sequences.offsets[1:] - 1] = 0
    if layout == "shared" and prompts is not None and _is_shared(prompts):
        needed = _needed(sequences, is_source, prompts)
        sequences, following, is_source = sequences.masked(needed), following[needed], is_source[needed]
        rectangle = _behind_prompts(sequences, prompts)
    elif layout == "packed":
        rectangle = _Rectangle((1, len(following)), np.arange(len(following)))
    else:
        width = int(sequences.lengths.max())
        rectangle = _Rectangle((len(sequences), width), sequences.row_ids * width + column_ids(sequences))

    def filled(values: Array | None) -> torch.Tensor | None:
        return None if values is None else torch.from_numpy(rectangle.filled(values)).to(device)

    has_several = layout == "packed" or rectangle.answer_ids is not None
    input_ids = filled(sequences.values)
    assert input_ids is not None
    return TokenBatch(
        input_ids=input_ids,
        position_ids=filled(column_ids(sequences) if has_several else None),
        select=torch.from_numpy(rectangle.places[is_source]).to(device),
        targets=torch.from_numpy(following[is_source]).to(device),
        answer_ids=filled(rectangle.answer_ids),
    )


@dataclass(frozen=True)
class _Rectangle:
    """Where the tokens of ragged sequences stand in a rectangle.

    Fields:
        shape: (b, t). places: [sum of lengths] index of each token in the flattened rectangle.
        answer_ids: [sum of lengths] as in `TokenBatch`, or None.
    """

    shape: tuple[int, int]
    places: NDArray[np.int64]
    answer_ids: NDArray[np.int64] | None = None

    def filled(self, values: Array) -> NDArray[np.int64]:
        grid = np.zeros(self.shape[0] * self.shape[1], dtype=np.int64)
        grid[self.places] = values
        return grid.reshape(self.shape)


def same_prompts(prompts: Ragged) -> NDArray[np.int64]:
    """[B] the number of each row's prompt, in the order in which prompts first appear."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(prompt.tobytes(), len(seen)) for prompt in prompts], dtype=np.int64)


def _is_shared(prompts: Ragged) -> bool:
    return int(same_prompts(prompts).max()) + 1 < len(prompts)


def _needed(sequences: Ragged, is_source: NDArray[np.bool_], prompts: Ragged) -> NDArray[np.bool_]:
    """[sum of lengths] False after the last source of an answer: nothing that is wanted sees it."""
    columns = column_ids(sequences)
    last = np.maximum.reduceat(np.where(is_source, columns, 0), sequences.offsets[:-1])
    return columns < np.repeat(np.maximum(last + 1, prompts.lengths), sequences.lengths)


def _behind_prompts(sequences: Ragged, prompts: Ragged) -> _Rectangle:
    """A row for each different prompt: the prompt, and all answers to it one behind the other."""
    groups = same_prompts(prompts)
    answer_lengths = sequences.lengths - prompts.lengths
    filled = np.zeros(int(groups.max()) + 1, dtype=np.int64)
    filled[groups] = prompts.lengths
    starts = np.empty(len(groups), dtype=np.int64)
    for row, group in enumerate(groups):
        starts[row] = filled[group]
        filled[group] += answer_lengths[row]
    width, rows, columns = int(filled.max()), sequences.row_ids, column_ids(sequences)
    in_answer = columns - prompts.lengths[rows]
    places = groups[rows] * width + np.where(in_answer < 0, columns, starts[rows] + in_answer)
    return _Rectangle((len(filled), width), places, np.where(in_answer < 0, 0, rows + 1))


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


def plan_micro_batches(
    lengths: NDArray[np.int64], num_ranks: int, token_budget: int, prompts: Ragged | None = None
) -> Plan:
    """Group rows of similar length up to a budget of padded tokens, and give every rank an equal share.

    There are as few micro-batches as the budget allows (each costs time whatever its size), and they are as
    equal as that leaves room for. Every rank computes the same plan from the same lengths, so nothing is
    communicated. A row longer than the budget is a micro-batch by itself.

    Args:
        lengths: [B] tokens of each row.
        prompts: B rows, where the rows are answers that share their prompts: those to a prompt then go
            together, as many as the budget has room for.
    """
    if prompts is None:
        return _plan(lengths, num_ranks, token_budget)
    # As `collate` has it, the last token of an answer is not computed.
    answers = np.maximum(lengths - prompts.lengths - 1, 0)
    bundles = _bundles(prompts, answers, num_ranks, token_budget)
    costs = np.array([prompts.lengths[rows[0]] + answers[rows].sum() for rows in bundles], dtype=np.int64)
    return [
        [[row for bundle in bundle_ids for row in bundles[bundle]] for bundle_ids in micro_batches]
        for micro_batches in _plan(costs, num_ranks, token_budget)
    ]


def _bundles(
    prompts: Ragged, answers: NDArray[np.int64], num_ranks: int, token_budget: int
) -> list[list[int]]:
    """Rows that share a prompt. With the longest answers first, all bundles of a prompt but the last fill
    more than half of the budget, so that no two of them meet in a micro-batch.

    Args:
        answers: [B] tokens of each row after its prompt.
    """
    groups = same_prompts(prompts)
    bundles: list[list[int]] = []
    group, used = -1, 0
    for row in np.lexsort((-answers, groups)):
        if groups[row] != group or used + answers[row] > token_budget:
            group, used = groups[row], prompts.lengths[row]
            bundles.append([])
        bundles[-1].append(int(row))
        used += answers[row]
    # No rank stays without work while another has several rows.
    while 0 < len(bundles) < num_ranks and len(largest := max(bundles, key=len)) > 1:
        bundles.append(largest[1::2])
        del largest[1::2]
    return bundles


def _plan(lengths: NDArray[np.int64], num_ranks: int, token_budget: int) -> Plan:
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
