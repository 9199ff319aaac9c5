"""Which rows go together, and on which rank."""

from __future__ import annotations

import bisect
import heapq
import math

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.models.batching import same_prompts
from rlhf_ray.types import Ragged

Plan = list[list[list[int]]]
"""rank -> micro-batch -> rows. Every rank has the same number of micro-batches; some may be empty."""
MICRO_BATCH_COST = 256
"""In tokens, what a micro-batch costs whatever its size: all weights are read and cast, and all gradients
added up. With 6 operations a weight and token and about 16 bytes moved a weight, that is 2.7 times a
machine's operations a byte: some 70 tokens on a CPU core, some 500 on a large GPU."""


def plan_micro_batches(
    lengths: NDArray[np.int64],
    num_ranks: int,
    token_budget: int,
    prompts: Ragged | None = None,
    packed: bool = False,
) -> Plan:
    """Group rows of similar length up to a budget of padded tokens, and give every rank an equal share.

    More micro-batches than the budget asks for leave out padding and cost time of their own; the plan weighs
    the two. Every rank computes the same plan from the same lengths, so nothing is communicated. A row longer
    than the budget is a micro-batch by itself.

    Args:
        lengths: [B] tokens of each row.
        prompts: B rows, where the rows are answers that share their prompts: those to a prompt then go
            together, as many as the budget has room for.
        packed: nothing is padded, so that rows of any lengths go together.
    """
    if packed:
        return _plan_packed(lengths, num_ranks, token_budget)
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


def _plan_packed(lengths: NDArray[np.int64], num_ranks: int, token_budget: int) -> Plan:
    """As few micro-batches as the budget allows, all about equally long: the next longest row goes to the
    shortest of them."""
    rounds = max(1, -(-int(lengths.sum()) // (token_budget * num_ranks)))
    while True:
        bins: list[list[int]] = [[] for _ in range(rounds * num_ranks)]
        heap = [(0, number) for number in range(len(bins))]
        for row in np.argsort(-lengths, kind="stable"):
            load, number = heapq.heappop(heap)
            bins[number].append(int(row))
            heapq.heappush(heap, (load + int(lengths[row]), number))
        fits = all(len(rows) <= 1 or lengths[rows].sum() <= token_budget for rows in bins)
        if fits:
            return [bins[rank::num_ranks] for rank in range(num_ranks)]
        rounds += 1


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
    """The cheapest of some ways to cut the rows and to deal them out."""
    order = np.argsort(-lengths, kind="stable")
    least = -(-len(_cut(order, lengths, token_budget)) // num_ranks)
    candidates = []
    for factor in (1.0, 1.25, 1.5, 2.0, 3.0, 4.0):
        # As equal as so many micro-batches can be; and as little padded as those of their size can be.
        size = _smallest_budget(order, lengths, token_budget, math.ceil(factor * least) * num_ranks)
        for micro_batches in (_cut(order, lengths, size), _least_padded(order, lengths, size)):
            candidates.append(_deal(micro_batches, lengths, num_ranks))
    _, ranks = min(candidates, key=lambda candidate: candidate[0])
    rounds = max(len(batches) for batches in ranks)
    return [batches + [[]] * (rounds - len(batches)) for batches in ranks]


def _smallest_budget(
    order: NDArray[np.int64], lengths: NDArray[np.int64], token_budget: int, num_micro_batches: int
) -> int:
    """With which the rows still fit into so many micro-batches."""
    return bisect.bisect_left(
        range(token_budget),
        True,
        key=lambda budget: len(_cut(order, lengths, budget)) <= num_micro_batches,
    )


def _cut(order: NDArray[np.int64], lengths: NDArray[np.int64], budget: int) -> list[list[int]]:
    """Cut rows, in order of falling length, where the next would exceed the budget of padded tokens."""
    micro_batches: list[list[int]] = []
    for row in order:
        longest = lengths[micro_batches[-1][0]] if micro_batches else 0
        if not micro_batches or longest * (len(micro_batches[-1]) + 1) > budget:
            micro_batches.append([])
        micro_batches[-1].append(int(row))
    return micro_batches


def _least_padded(order: NDArray[np.int64], lengths: NDArray[np.int64], budget: int) -> list[list[int]]:
    """Cut rows, in order of falling length, where padded tokens and micro-batches together cost least."""
    falling, num_rows = lengths[order], len(order)
    cost = np.full(num_rows + 1, np.iinfo(np.int64).max)  # of the first so many rows
    cost[0] = 0
    begin = np.zeros(num_rows + 1, dtype=np.int64)  # of the last micro-batch of these
    counts = np.arange(1, num_rows + 1)
    for first in range(num_rows):
        fits = min(max(1, budget // max(1, int(falling[first]))), num_rows - first)
        ends = slice(first + 1, first + fits + 1)
        through_here = cost[first] + MICRO_BATCH_COST + falling[first] * counts[:fits]
        is_better = through_here < cost[ends]
        cost[ends][is_better] = through_here[is_better]
        begin[ends][is_better] = first
    micro_batches, end = [], num_rows
    while end:
        micro_batches.append(order[begin[end] : end].tolist())
        end = int(begin[end])
    return micro_batches[::-1]


def _deal(
    micro_batches: list[list[int]], lengths: NDArray[np.int64], num_ranks: int
) -> tuple[int, list[list[list[int]]]]:
    """Longest processing time first: the next heaviest goes to the least loaded rank.

    Returns:
        What the slowest rank costs, and each rank's micro-batches.
    """

    def padded(rows: list[int]) -> int:
        return int(lengths[rows[0]]) * len(rows)

    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    heap = [(0, rank) for rank in range(num_ranks)]
    for rows in sorted(micro_batches, key=lambda rows: -padded(rows)):
        load, rank = heapq.heappop(heap)
        ranks[rank].append(rows)
        heapq.heappush(heap, (load + padded(rows), rank))
    rounds = max(len(batches) for batches in ranks)
    return max(load for load, _ in heap) + MICRO_BATCH_COST * rounds, ranks
