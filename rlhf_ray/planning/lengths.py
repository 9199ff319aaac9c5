"""How long answers are: many short ones and a long tail, for which a synchronous step waits."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

SPREAD = 0.8
"""Standard deviation of the logarithm: a hundredth of the answers are more than four times as long as the
mean."""


def long_tailed(generator: np.random.Generator, count: int, spread: float = SPREAD) -> NDArray[np.float64]:
    """[count] log-normal, of mean 1."""
    return generator.lognormal(-(spread**2) / 2, spread, count)


@dataclass(frozen=True)
class Lengths:
    """Tokens of answers: log-normal, and cut where they must end.

    Fields:
        mean: after the cut. longest: where they are cut.
    """

    mean: float
    longest: int
    spread: float = SPREAD

    def typical(self, count: int) -> NDArray[np.float64]:
        """[count] longest first: the quantiles in the middle of equal parts."""
        normal = NormalDist()
        points = [(count - index - 0.5) / count for index in range(count)]
        return self._cut(np.exp(self.spread * np.array([normal.inv_cdf(point) for point in points])))

    def draw(self, generator: np.random.Generator, count: int) -> NDArray[np.float64]:
        return np.minimum(self._scale * long_tailed(generator, count, self.spread), self.longest).clip(1)

    @property
    def _scale(self) -> float:
        """Mean before the cut that gives the mean after it."""
        normal, spread = NormalDist(), self.spread
        if self.mean >= self.longest:
            return 1e9

        def mean_after(scale: float) -> float:
            # E[min(X, c)] of a log-normal X.
            middle = np.log(scale) - spread**2 / 2
            z = (np.log(self.longest) - middle) / spread
            return float(scale * normal.cdf(z - spread) + self.longest * (1 - normal.cdf(z)))

        scales = np.geomspace(self.mean, 1e3 * self.longest, 2000)
        return float(scales[bisect.bisect_left(scales, self.mean, key=mean_after, hi=len(scales) - 1)])

    def _cut(self, shape: NDArray[np.float64]) -> NDArray[np.float64]:
        scale = self._scale * float(np.exp(-(self.spread**2) / 2))
        return np.minimum(scale * shape, self.longest).clip(1)
