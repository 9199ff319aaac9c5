"""Rectangles by hand, and plans over ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.config.schema import Layout
from rlhf_ray.models.batching import before_responses, before_targets, collate, column_ids, last_positions
from rlhf_ray.models.inference import forward_rows, in_row_order
from rlhf_ray.models.planning import MICRO_BATCH_COST, plan_micro_batches
from rlhf_ray.types import Ragged

CPU = torch.device("cpu")
EOS = 2
SEQUENCES = Ragged.from_rows([[5, 6, EOS], [8, EOS], [7, 7, 7, EOS]], np.int32)


def test_right_padding_by_hand() -> None:
    is_target = SEQUENCES.with_values(np.array([0, 1, 1, 0, 1, 0, 0, 1, 1], dtype=bool))
    batch = collate(SEQUENCES, before_targets(is_target), layout="padded", device=CPU)
    assert batch.input_ids.tolist() == [[5, 6, EOS, 0], [8, EOS, 0, 0], [7, 7, 7, EOS]]
    assert batch.position_ids is None
    # Row 0 predicts at its positions 0 and 1, row 1 at 0, row 2 at 1 and 2; rows are 4 wide.
    assert batch.select.tolist() == [0, 1, 4, 9, 10]
    assert batch.targets.tolist() == [6, EOS, EOS, 7, EOS]


def test_packing_by_hand() -> None:
    is_target = SEQUENCES.with_values(np.array([0, 1, 1, 0, 1, 0, 0, 1, 1], dtype=bool))
    batch = collate(SEQUENCES, before_targets(is_target), layout="packed", device=CPU)
    assert batch.input_ids.tolist() == [[5, 6, EOS, 8, EOS, 7, 7, 7, EOS]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch.select.tolist() == [0, 1, 3, 6, 7]
    assert batch.targets.tolist() == [6, EOS, EOS, 7, EOS]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_last_position_has_no_target_of_the_next_row(layout: Layout) -> None:
    batch = collate(SEQUENCES, last_positions(SEQUENCES), layout, CPU)
    assert batch.targets.tolist() == [0, 0, 0]
    assert batch.input_ids.flatten()[batch.select].tolist() == [EOS, EOS, EOS]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_no_rows_are_one_token_that_nobody_reads(layout: Layout) -> None:
    nothing = Ragged.from_rows([], np.int32)
    batch = collate(nothing, np.empty(0, dtype=bool), layout, CPU)
    assert batch.input_ids.tolist() == [[0]]
    assert (len(batch.select), len(batch.targets)) == (0, 0)
    assert (batch.position_ids is not None) == (layout == "packed")


def test_eos_is_a_target_although_it_may_be_the_pad_token() -> None:
    """Prompts of 1, 1 and 2 tokens: every response token is predicted, the EOS of each row among them."""
    is_source = before_responses(np.array([1, 1, 2]), SEQUENCES)
    assert is_source.tolist() == [1, 1, 0, 1, 0, 0, 1, 1, 0]
    assert collate(SEQUENCES, is_source, "padded", CPU).targets.tolist() == [6, EOS, EOS, 7, EOS]


def test_target_at_the_first_token_has_nothing_before_it() -> None:
    rows = SEQUENCES.with_values(np.array([1, 0, 0, 1, 1, 1, 0, 0, 0], dtype=bool))
    assert before_targets(rows).tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_columns_and_last_positions() -> None:
    assert column_ids(SEQUENCES).tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert last_positions(SEQUENCES).tolist() == [0, 0, 1, 0, 1, 0, 0, 0, 1]


def padded(rows: list[int], lengths: np.ndarray) -> int:
    return len(rows) * int(lengths[rows].max()) if rows else 0


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(1, 300),
)
def test_plan(row_lengths: list[int], num_ranks: int, token_budget: int) -> None:
    lengths = np.array(row_lengths)
    plan = plan_micro_batches(lengths, num_ranks, token_budget)
    assert len(plan) == num_ranks
    assert len({len(batches) for batches in plan}) == 1, "ranks must stay in lockstep"
    rows = [row for batches in plan for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths))), "every row once"
    costs = [[padded(batch, lengths) for batch in batches] for batches in plan]
    for batches, rank_costs in zip(plan, costs, strict=True):
        for batch, cost in zip(batches, rank_costs, strict=True):
            assert cost <= token_budget or len(batch) == 1
    # The last micro-batch that the heaviest rank got went to what was the least loaded rank then.
    loads = [sum(each) for each in costs]
    assert max(loads) - min(loads) <= max(max(each) for each in costs)
    assert plan == plan_micro_batches(lengths, num_ranks, token_budget)


def test_plan_shares_out_what_fits_into_one_micro_batch() -> None:
    """A large budget must not leave a rank without work."""
    plan = plan_micro_batches(np.full(8, 10), num_ranks=2, token_budget=10_000)
    assert [[len(batch) for batch in batches] for batches in plan] == [[4], [4]]


def partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    """All ways to put rows into micro-batches."""
    if not rows:
        yield []
        return
    first, *others = rows
    for rest in partitions(others):
        yield [[first], *rest]
        for index, batch in enumerate(rest):
            yield [*rest[:index], [first, *batch], *rest[index + 1 :]]


@given(st.lists(st.integers(1, 600), min_size=1, max_size=6))
def test_plan_weighs_padding_against_micro_batches(row_lengths: list[int]) -> None:
    """Where the budget has room for anything, nothing is cheaper."""
    lengths = np.array(row_lengths)

    def cost(batches: list[list[int]]) -> int:
        return sum(padded(batch, lengths) + MICRO_BATCH_COST for batch in batches)

    (batches,) = plan_micro_batches(lengths, 1, 10_000)
    assert cost(batches) == min(cost(each) for each in partitions(list(range(len(lengths)))))


def test_plan_of_equal_rows_fills_the_budget() -> None:
    (batches,) = plan_micro_batches(np.full(8, 10), num_ranks=1, token_budget=40)
    assert [len(batch) for batch in batches] == [4, 4]


def test_rows_come_back_in_their_order() -> None:
    """Each rank computes some rows; the answer is their token ids at the selected positions."""
    is_source = np.array([1, 0, 1, 0, 1, 0, 1, 1, 0], dtype=bool)

    def read_ids(batch) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return batch.input_ids.flatten()[batch.select].float()

    parts = [
        forward_rows(read_ids, SEQUENCES, is_source, micro_batches, layout="padded", device=CPU)
        for micro_batches in ([[2], []], [[1, 0]])
    ]
    found = in_row_order(parts)
    assert [row.tolist() for row in found] == [[5.0, 2.0], [2.0], [7.0, 7.0]]
