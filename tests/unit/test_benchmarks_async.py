"""The model that the loop over sleeping engines is measured against."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.async_sim import Case, predicted_seconds, prompts_of
from benchmarks.sleepers import busy_seconds, seconds_of

CASE = Case(num_engines=2, max_lag=0, slots=1, train=2.0, sync=0.5)
BATCHES = [[1.0, 3.0, 2.0, 4.0], [1.0, 1.0, 1.0, 1.0]]


def test_an_engine_answers_in_order_as_many_as_it_has_slots() -> None:
    assert busy_seconds([3.0, 1.0, 2.0], 1) == 6.0
    assert busy_seconds([3.0, 1.0, 2.0], 2) == 3.0
    assert busy_seconds([], 2) == 0.0


def test_a_synchronous_step_waits_for_the_slowest_engine_and_then_trains() -> None:
    """Engines have [1, 3] and [2, 4], then [1, 1] each."""
    assert predicted_seconds(CASE, BATCHES) == (6.0 + 2.0) + 2 * 2.5


def test_a_step_ahead_goes_on_beside_training() -> None:
    """Both batches are asked for at once, in turn: one engine has 1, 2, 1, 1, the other 3, 4, 1, 1. The first
    is there after 7 and trained on after 9.5, when the second has been there for half a second."""
    ahead = Case(num_engines=2, max_lag=1, slots=1, train=2.0, sync=0.5)
    assert predicted_seconds(ahead, BATCHES) == 7.0 + 2.5 + 2.5


def test_answers_are_long_tailed_around_their_mean() -> None:
    seconds = np.array(seconds_of(prompts_of(Case(num_engines=64, max_lag=0, answer=0.5))))
    assert seconds.mean() == pytest.approx(0.5, rel=0.1)
    assert seconds.max() > 5 * seconds.mean()
