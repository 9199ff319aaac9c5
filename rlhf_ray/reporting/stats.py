"""The few statistics of the closing report, each with an interval: numpy and closed forms only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
Floats = Sequence[float] | NDArray[np.floating]


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` values and its two-sided 95 % interval; NaN where `n` is too small to say."""

    mean: float
    low: float
    high: float
    n: int


def student_t_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t with a whole number of degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4: a finite series, exact.
    """
    theta = math.atan(t / math.sqrt(df))
    cos_squared = math.cos(theta) ** 2
    if df % 2:
        factors = [2 * k / (2 * k + 1) * cos_squared for k in range(1, (df - 1) // 2)]
        series = math.cos(theta) * float(np.cumprod([1.0, *factors]).sum()) if df > 1 else 0.0
        inside = 2 / math.pi * (theta + math.sin(theta) * series)
    else:
        factors = [(2 * k - 1) / (2 * k) * cos_squared for k in range(1, df // 2)]
        inside = math.sin(theta) * float(np.cumprod([1.0, *factors]).sum())
    return 0.5 * (1 + inside)


def student_t_quantile(p: float, df: int) -> float:
    """The t with P(T <= t) = p, for 0.5 <= p < 1, by bisection."""
    low, high = 0.0, 1.0
    while student_t_cdf(high, df) < p:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def mean_ci(values: Floats) -> Estimate:
    """Mean with the interval mean +- t(0.975, n - 1) * s / sqrt(n)."""
    array = np.asarray(values, dtype=np.float64)
    n = len(array)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(array.mean())
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = student_t_quantile(0.5 + CONFIDENCE / 2, n - 1) * float(array.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def paired_bootstrap(start: Floats, end: Floats, seed: int = 0, num_resamples: int = 4000) -> Estimate:
    """Mean of end - start over pairs, with the percentile bootstrap interval (Efron 1979) over pairs.

    The resampled means vary by (n - 1) / n too little; their distance from the mean is widened by the root of
    the inverse, which matters for a handful of pairs only.
    """
    differences = np.asarray(end, dtype=np.float64) - np.asarray(start, dtype=np.float64)
    n = len(differences)
    if n < 2:
        return mean_ci(differences)
    rng = np.random.default_rng(seed)
    mean = float(differences.mean())
    resampled = np.array([differences[rng.integers(0, n, n)].mean() for _ in range(num_resamples)])
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = mean + (np.quantile(resampled, tails) - mean) * math.sqrt(n / (n - 1))
    return Estimate(mean, float(low), float(high), n)


def wilson(successes: float, n: int) -> Estimate:
    """Share successes / n with Wilson's score interval (Wilson 1927).

    `successes` may count ties as a half. A tie varies less than a coin, so the interval is then too wide,
    never too narrow.
    """
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), n)


def correlation(x: Floats, y: Floats) -> float:
    """Pearson's r; NaN for fewer than two values or where either is constant."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / math.sqrt((a @ a) * (b @ b)))


def distinct_n(texts: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams over all n-grams of all texts (after Li et al. 2016); NaN if there are none.

    It falls with the amount of text: compare equal amounts.

    Args:
        texts: the words of each text.
    """
    grams = [tuple(words[i : i + n]) for words in texts for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
