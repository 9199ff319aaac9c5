"""No prompt on both sides of the split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data.split import split_key, split_rows
from rlhf_ray.errors import DataError


@given(
    keys=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=60),
    held_out=st.one_of(st.floats(0.01, 0.99), st.integers(1, 30)),
    seed=st.integers(0, 1000),
)
def test_no_key_is_on_both_sides(keys: list[str], held_out: float, seed: int) -> None:
    try:
        train, test = split_rows(keys, held_out, seed)
    except DataError as error:
        assert "nothing to train on" in str(error)
        return
    assert sorted([*train, *test]) == list(range(len(keys)))
    assert not {keys[row] for row in train} & {keys[row] for row in test}
    wanted = max(1, round(held_out * len(keys))) if held_out < 1 else held_out
    largest = max(keys.count(keys[row]) for row in test)
    assert wanted <= len(test) < wanted + largest


def test_a_fraction_and_a_count_of_rows_with_keys_of_their_own() -> None:
    keys = [f"prompt {row}" for row in range(200)]
    assert [len(side) for side in split_rows(keys, 0.15, seed=0)] == [170, 30]
    assert [len(side) for side in split_rows(keys, 30, seed=0)] == [170, 30]
    assert list(split_rows(keys, 30, seed=0)[1]) != list(split_rows(keys, 30, seed=1)[1])


def test_the_order_of_the_rows_does_not_matter() -> None:
    keys = [f"prompt {row // 2}" for row in range(40)]
    order = np.random.default_rng(0).permutation(40)
    _, test = split_rows(keys, 0.25, seed=5)
    _, shuffled = split_rows([keys[row] for row in order], 0.25, seed=5)
    assert {keys[row] for row in test} == {keys[order[row]] for row in shuffled}


@pytest.mark.parametrize("held_out", [0.0, -1.0, 1.5, float("nan")])
def test_a_number_that_is_neither_fraction_nor_count_is_refused(held_out: float) -> None:
    with pytest.raises(DataError, match=r"held_out=.*fraction between 0 and 1, or a whole number"):
        split_rows(["a", "b"], held_out, seed=0)


def test_one_key_for_all_rows_leaves_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="5 rows with 1 different keys"):
        split_rows(["same"] * 5, 0.2, seed=0)


def test_keys_by_prompt_and_by_first_turn() -> None:
    short = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hello "}]
    long = [*short, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "How are you?"}]
    assert split_key(short, "first_turn") == split_key(long, "first_turn") == "Hello"
    assert split_key(short, "prompt") != split_key(long, "prompt")
    assert split_key(short, "prompt") == split_key([dict(turn) for turn in short], "prompt")
