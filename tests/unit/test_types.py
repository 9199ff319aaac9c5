from __future__ import annotations

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlhf_ray.seeds import derive_seed
from rlhf_ray.types import PairBatch, Prompts, Ragged, Rows, SFTBatch

ROWS = st.lists(st.lists(st.integers(-9, 9), max_size=5), max_size=6)


def ragged(*rows: list[int]) -> Ragged:
    return Ragged.from_rows(rows, np.int32)


def rows_of(batch: Ragged) -> list[list[int]]:
    return [row.tolist() for row in batch]


def test_rows_live_between_their_offsets() -> None:
    batch = ragged([1, 2, 3], [], [4])
    assert batch.values.tolist() == [1, 2, 3, 4]
    assert batch.offsets.tolist() == [0, 3, 3, 4]
    assert batch.lengths.tolist() == [3, 0, 1]
    assert batch.row_ids.tolist() == [0, 0, 0, 2]
    assert batch[0].tolist() == [1, 2, 3]
    assert batch[1].tolist() == []
    assert len(batch) == 3


def test_no_rows_keep_their_type() -> None:
    nothing = Ragged.from_rows([], np.float32)
    assert (nothing.values.dtype, nothing.offsets.tolist(), len(nothing)) == (np.float32, [0], 0)
    assert ragged([1], [2]).select([]).values.dtype == np.int32


def test_lengths_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="lengths sum to 3, but there are 2 values"):
        Ragged.from_lengths(np.zeros(2), [1, 2])
    with pytest.raises(ValueError, match="sum to 2"):
        ragged([1], [2]).with_values(np.zeros(3))


def test_join_puts_each_response_after_its_prompt() -> None:
    assert rows_of(Ragged.join(ragged([1, 2], [3]), ragged([4], [5, 6]))) == [[1, 2, 4], [3, 5, 6]]
    with pytest.raises(ValueError, match="zip"):
        Ragged.join(ragged([1]), ragged([1], [2]))


@given(ROWS, ROWS)
def test_concat_and_select_are_inverses(left: list[list[int]], right: list[list[int]]) -> None:
    both = Ragged.concat([ragged(*left), ragged(*right)])
    assert rows_of(both) == left + right
    assert rows_of(both.select(list(range(len(left))))) == left
    assert rows_of(both.select(list(range(len(left), len(both))))) == right


@given(ROWS)
def test_select_takes_rows_in_any_order_and_again(rows: list[list[int]]) -> None:
    order = [*reversed(range(len(rows))), *range(len(rows))]
    assert rows_of(ragged(*rows).select(order)) == [*reversed(rows), *rows]


@dataclass(frozen=True)
class Mixed(Rows):
    tokens: Ragged
    ids: NDArray[np.int64]
    names: tuple[str, ...]


def test_rows_select_and_concat_every_kind_of_column() -> None:
    batch = Mixed(ragged([1], [2, 3], []), np.array([10, 20, 30]), ("a", "b", "c"))
    chosen = batch.select([2, 1])
    assert len(chosen) == 2
    assert rows_of(chosen.tokens) == [[], [2, 3]]
    assert chosen.ids.tolist() == [30, 20]
    assert chosen.names == ("c", "b")
    both = Mixed.concat([chosen, batch.select([0])])
    assert rows_of(both.tokens) == [[], [2, 3], [1]]
    assert both.ids.tolist() == [30, 20, 10]
    assert both.names == ("c", "b", "a")


def test_no_rows_selected_is_a_batch_of_none() -> None:
    batch = PairBatch(np.array([1]), ragged([1, 2]), ragged([1, 3]), *np.zeros((2, 1), np.float32))
    nothing = batch.select([])
    assert (len(nothing), nothing.prompt_lengths.dtype, nothing.margin.dtype) == (0, np.int64, np.float32)


def test_batches_survive_pickling_and_read_only_arrays() -> None:
    batch = SFTBatch(ragged([1, 2]), Ragged.from_rows([[False, True]], np.bool_))
    batch.tokens.values.setflags(write=False)
    copy = pickle.loads(pickle.dumps(batch))
    assert rows_of(SFTBatch.concat([batch, copy]).tokens) == [[1, 2], [1, 2]]
    assert rows_of(batch.select([0, 0]).tokens) == [[1, 2], [1, 2]]


@pytest.mark.parametrize("value", [np.True_, np.int32(7), np.float32(-0.5), np.float32("nan")])
def test_what_is_the_same_everywhere_travels_as_one(value: np.generic) -> None:
    many = Ragged.from_lengths(np.full(100_000, value), [99_999, 1])
    for column in (many, many.filled(value)):
        sent = pickle.dumps(column, protocol=5)
        assert len(sent) < 1_000
        came = pickle.loads(sent)
        assert came.values.dtype == many.values.dtype
        assert came.values.tobytes() == many.values.tobytes()
        assert came.offsets.tolist() == [0, 99_999, 100_000]
        assert len(pickle.dumps(came, protocol=5)) < 1_000, "and goes on as one"
        assert came.select([1, 1]).values.tobytes() == many.values[:2].tobytes()


@pytest.mark.parametrize("position", [0, 1, 70_000, 99_999])
def test_what_differs_anywhere_travels_whole(position: int) -> None:
    values = np.zeros(100_000, dtype=np.float32)
    values[position] = -0.0  # equal, but not the same
    column = Ragged.from_lengths(values, [100_000])
    came = pickle.loads(pickle.dumps(column, protocol=5))
    assert came.values.tobytes() == values.tobytes()


def test_prompts_keep_columns_with_their_rows() -> None:
    turns = tuple(({"role": "user", "content": name},) for name in "ab")
    prompts = Prompts(np.array([5, 6]), turns, ragged([1], [2]), ({"k": 1}, {"k": 2}))
    last = prompts.select([1])
    assert (last.ids.tolist(), last.messages, last.columns) == ([6], turns[1:], ({"k": 2},))


def test_seeds_depend_on_every_part_and_on_their_number() -> None:
    parts = [(), (0,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1,), (2**32,), (7,), (7, 0)]
    seeds = [derive_seed(*each) for each in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(7, 3) == 60586156  # on every machine: resumed runs depend on it


def test_masked_rows_keep_their_places() -> None:
    rows = Ragged.from_rows([[1, 2, 3], [4], [], [5, 6]], np.int32)
    kept = rows.masked(np.array([True, False, True, False, False, True]))
    assert [row.tolist() for row in kept] == [[1, 3], [], [], [6]]
    assert kept.values.dtype == np.int32
