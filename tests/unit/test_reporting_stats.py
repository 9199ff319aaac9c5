"""Against published tables and hand computation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_ray.reporting.stats import (
    Estimate,
    correlation,
    distinct_n,
    mean_ci,
    paired_bootstrap,
    student_t_cdf,
    student_t_quantile,
    wilson,
)


# The column 0.975 (and 0.95, 0.995) of any printed table of Student's t.
@pytest.mark.parametrize(
    ("p", "df", "expected"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 3, 3.1824),
        (0.975, 4, 2.7764),
        (0.975, 9, 2.2622),
        (0.975, 10, 2.2281),
        (0.975, 30, 2.0423),
        (0.95, 5, 2.0150),
        (0.995, 7, 3.4995),
        (0.975, 100_000, 1.95998),
    ],
)
def test_student_t_quantile_equals_the_printed_table(p: float, df: int, expected: float) -> None:
    assert student_t_quantile(p, df) == pytest.approx(expected, abs=1e-4)


def test_student_t_cdf_is_symmetric_and_cauchy_for_one_degree_of_freedom() -> None:
    assert student_t_cdf(0.0, 7) == 0.5
    assert student_t_cdf(-1.3, 6) + student_t_cdf(1.3, 6) == pytest.approx(1.0, abs=1e-12)
    assert student_t_cdf(1.0, 1) == pytest.approx(0.75, abs=1e-12)


def test_mean_ci_by_hand() -> None:
    # mean 3, s = sqrt(10 / 4), t(0.975, 4) = 2.77645: half = 2.77645 * 1.58114 / sqrt(5) = 1.96324
    found = mean_ci([1, 2, 3, 4, 5])
    assert (found.mean, found.n) == (3.0, 5)
    assert found.low == pytest.approx(1.03676, abs=1e-5)
    assert found.high == pytest.approx(4.96324, abs=1e-5)


def test_too_few_values_have_no_interval() -> None:
    one = mean_ci([4.0])
    assert one.mean == 4.0 and math.isnan(one.low) and math.isnan(one.high)
    assert math.isnan(mean_ci([]).mean) and mean_ci([]).n == 0
    assert math.isnan(wilson(0, 0).mean)
    assert math.isnan(paired_bootstrap([1.0], [2.0]).low)


def test_mean_ci_covers_the_truth_in_95_of_100_small_samples() -> None:
    rng = np.random.default_rng(0)
    found = [mean_ci(rng.normal(2.0, 3.0, 4)) for _ in range(3000)]
    coverage = np.mean([estimate.low <= 2.0 <= estimate.high for estimate in found])
    assert coverage == pytest.approx(0.95, abs=0.012)


def test_paired_bootstrap_agrees_with_the_t_interval_on_normal_differences() -> None:
    rng = np.random.default_rng(1)
    start = rng.normal(0, 5, 300)
    end = start + rng.normal(0.5, 1, 300)
    bootstrap, exact = paired_bootstrap(start, end), mean_ci(end - start)
    assert bootstrap.mean == pytest.approx(exact.mean)
    assert bootstrap.low == pytest.approx(exact.low, abs=0.01)
    assert bootstrap.high == pytest.approx(exact.high, abs=0.01)
    assert bootstrap == paired_bootstrap(start, end)


def test_paired_bootstrap_of_a_constant_shift_has_no_width() -> None:
    assert paired_bootstrap([1.0, 5.0, 9.0], [3.0, 7.0, 11.0]) == Estimate(2.0, 2.0, 2.0, 3)


def test_wilson_equals_known_intervals() -> None:
    eight = wilson(8, 10)
    assert [eight.low, eight.high] == pytest.approx([0.4902, 0.9433], abs=1e-4)
    # With no success the bounds are 0 and z^2 / (n + z^2).
    none = wilson(0, 10)
    assert none.low == pytest.approx(0, abs=1e-12)
    assert none.high == pytest.approx(3.8415 / 13.8415, abs=1e-4)
    assert wilson(10, 10).high == 1.0
    assert wilson(10, 10).low == pytest.approx(1 - none.high)


def test_correlation() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=50), rng.normal(size=50)
    assert correlation(x, x + y) == pytest.approx(np.corrcoef(x, x + y)[0, 1])
    assert correlation([1, 2, 3], [6, 4, 2]) == pytest.approx(-1.0)
    assert math.isnan(correlation([1, 1, 1], [1, 2, 3]))
    assert math.isnan(correlation([1], [2]))


def test_distinct_n_counts_over_all_texts() -> None:
    texts = [["a", "b", "a", "b"], ["a", "b"], ["c"]]
    # Bigrams: ab ba ab | ab -> 2 different of 4. Unigrams: a b c of 7.
    assert distinct_n(texts, 2) == 0.5
    assert distinct_n(texts, 1) == 3 / 7
    assert math.isnan(distinct_n([["a"], []], 2))
