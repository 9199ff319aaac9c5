"""The arithmetic of the benchmark scripts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from benchmarks.overoptimisation import best_of_n


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n: int) -> None:
    generator = np.random.default_rng(0)
    proxy, gold = generator.normal(size=(2, 3, 6))
    best = [
        (row, max(subset, key=lambda column: proxy[row, column]))
        for row in range(3)
        for subset in itertools.combinations(range(6), n)
    ]
    point = best_of_n(proxy, gold, n)
    assert point.proxy == pytest.approx(np.mean([proxy[place] for place in best]))
    assert point.gold == pytest.approx(np.mean([gold[place] for place in best]))
    assert point.kl == pytest.approx(math.log(n) - (n - 1) / n)
