"""Order of rows, and going on after a stop."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data.cursor import Cursor
from rlhf_ray.errors import CheckpointError


def test_every_row_comes_once_an_epoch_and_batches_have_a_constant_size() -> None:
    cursor = Cursor(num_rows=10, seed=3)
    batches = [cursor.next(4) for _ in range(5)]
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4]
    order = np.concatenate(batches)
    assert sorted(order[:10]) == list(range(10))
    assert sorted(order[10:]) == list(range(10))
    assert list(order[:10]) != list(order[10:]), "epochs are ordered alike"
    assert cursor.epoch == 2.0


def test_the_seed_decides_the_order() -> None:
    first = Cursor(50, seed=1).next(50)
    assert list(Cursor(50, seed=1).next(50)) == list(first)
    assert list(Cursor(50, seed=2).next(50)) != list(first)


def test_a_batch_may_be_larger_than_the_dataset() -> None:
    cursor = Cursor(3, seed=0)
    assert Counter(cursor.next(7).tolist()).most_common()[-1][1] >= 2
    assert cursor.position == 7
    assert cursor.epoch == pytest.approx(7 / 3)


@given(
    num_rows=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    counts=st.lists(st.integers(0, 15), min_size=1, max_size=8),
    stop=st.integers(0, 8),
)
def test_resumed_equals_uninterrupted(num_rows: int, seed: int, counts: list[int], stop: int) -> None:
    uninterrupted = Cursor(num_rows, seed)
    expected = [uninterrupted.next(count).tolist() for count in counts]
    cursor = Cursor(num_rows, seed)
    found = [cursor.next(count).tolist() for count in counts[:stop]]
    cursor = Cursor.from_state(json.loads(json.dumps(cursor.state())))
    found += [cursor.next(count).tolist() for count in counts[stop:]]
    assert found == expected
    assert cursor.state() == uninterrupted.state()


def test_resuming_at_the_boundary_of_an_epoch_hands_out_the_next_epoch() -> None:
    cursor = Cursor(6, seed=9)
    cursor.next(6)
    resumed = Cursor.from_state(cursor.state())
    following = resumed.next(6)
    assert sorted(following) == list(range(6))
    assert list(following) == list(cursor.next(6))


def test_the_state_before_a_draw_brings_the_untrained_batch_again() -> None:
    cursor = Cursor(8, seed=4)
    cursor.next(3)
    before = cursor.state()
    in_flight = cursor.next(3)
    cursor.next(3)
    assert list(Cursor.from_state(before).next(3)) == list(in_flight)


def test_rows_that_were_not_trained_on_come_again_first() -> None:
    cursor = Cursor(8, seed=4)
    trained = cursor.next(3).tolist()
    in_flight = cursor.next(4).tolist()
    state = json.loads(json.dumps(cursor.state(again=in_flight)))
    resumed = Cursor.from_state(state)
    assert resumed.next(2).tolist() == in_flight[:2]
    again = Cursor.from_state(json.loads(json.dumps(resumed.state(again=in_flight[:2]))))
    assert again.state() == state
    rest = again.next(5).tolist()
    assert rest[:4] == in_flight
    assert sorted(trained + rest) == list(range(8)), "every row once an epoch, and none twice"
    assert again.next(6).tolist() == cursor.next(7).tolist()[1:]


DAMAGED: list[dict[str, int | list[int]]] = [
    {},
    {"num_rows": 0, "seed": 0, "position": 0},
    {"num_rows": 4, "seed": 1},
    {"num_rows": 4, "seed": 1, "position": 2, "again": [4]},
]


@pytest.mark.parametrize("state", DAMAGED)
def test_a_damaged_state_is_refused(state: dict[str, int | list[int]]) -> None:
    with pytest.raises(CheckpointError, match="cursor state"):
        Cursor.from_state(state)
