"""Metrics as sums, so that they are the same for every split of a batch over micro-batches and ranks.

A loss returns `MetricSums`. `merge` adds those of several micro-batches; `pack` turns them into two tensors,
one to all-reduce with sum and one with max, and `unpack` turns them back; `finalise` gives the numbers.
Nothing before `finalise` moves a value to the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from rlhf_ray.types import Metrics


class Kind(Enum):
    """What the entries of `MetricSum.values` are, and how they become one number.

    MEAN: [sum of w x, sum of w] -> mean.
    EXP_MEAN: the same -> e^mean; the perplexity, when x is a token's negative log-likelihood.
    EXPLAINED_VARIANCE: [sums of w, w e, w e^2, w y, w y^2] for targets y and errors e -> 1 - Var(e) / Var(y).
    MAX, MIN: [largest or smallest x], infinite when there is none.
    """

    MEAN = "mean"
    EXP_MEAN = "exp_mean"
    EXPLAINED_VARIANCE = "explained_variance"
    MAX = "max"
    MIN = "min"


@dataclass(frozen=True)
class MetricSum:
    """One metric of a part of a batch; an empty part (weight 0) is legal and adds nothing.

    Fields:
        values: float64, without gradient; the entries are those of `kind`.
    """

    kind: Kind
    values: Tensor

    @classmethod
    def ratio(cls, total: Tensor, weight: Tensor) -> MetricSum:
        """The mean whose weighted sum and weight (scalars) are known already."""
        return cls(Kind.MEAN, _stack(total, weight))

    @classmethod
    def mean(cls, x: Tensor, weights: Tensor) -> MetricSum:
        """Mean of x [N] with weights [N], bool or float. Where a weight is 0, x may be anything, even NaN."""
        return cls(Kind.MEAN, _moments(x, weights=weights))

    @classmethod
    def exp_mean(cls, x: Tensor, weights: Tensor) -> MetricSum:
        return cls(Kind.EXP_MEAN, _moments(x, weights=weights))

    @classmethod
    def explained_variance(cls, targets: Tensor, predictions: Tensor, mask: Tensor) -> MetricSum:
        """1 - Var(targets - predictions) / Var(targets) over the N entries where mask is True."""
        targets = targets.double()
        errors = targets - predictions.double()
        error, count = _moments(errors, weights=mask)
        error_square, _ = _moments(errors.square(), weights=mask)
        target, _ = _moments(targets, weights=mask)
        target_square, _ = _moments(targets.square(), weights=mask)
        return cls(Kind.EXPLAINED_VARIANCE, _stack(count, error, error_square, target, target_square))

    @classmethod
    def max(cls, x: Tensor, mask: Tensor) -> MetricSum:
        """Largest of x [N] where mask [N] is True."""
        return cls(Kind.MAX, _largest(x, mask))

    @classmethod
    def min(cls, x: Tensor, mask: Tensor) -> MetricSum:
        return cls(Kind.MIN, -_largest(-x, mask))

    def __add__(self, other: MetricSum) -> MetricSum:
        if self.kind is not other.kind:
            raise ValueError(
                f"a metric of kind {self.kind.value} cannot be added to one of {other.kind.value}"
            )
        if self.kind is Kind.MAX:
            return MetricSum(self.kind, torch.maximum(self.values, other.values))
        if self.kind is Kind.MIN:
            return MetricSum(self.kind, torch.minimum(self.values, other.values))
        return MetricSum(self.kind, self.values + other.values)

    def value(self) -> float | None:
        """The number, or None where there is none: no entries, or the explained variance of a constant."""
        first, *rest = self.values.tolist()
        if self.kind in _SIGN:
            return None if first == _nothing(self.kind) else first
        if self.kind is Kind.EXPLAINED_VARIANCE:
            return _explained_variance(first, *rest)
        (weight,) = rest
        if weight == 0:
            return None
        mean = first / weight
        # torch's exp overflows to infinity, where math.exp raises.
        return mean if self.kind is Kind.MEAN else torch.tensor(mean, dtype=torch.float64).exp().item()


MetricSums = dict[str, MetricSum]


def merge(parts: Iterable[MetricSums]) -> MetricSums:
    """The metrics of all parts (micro-batches) together; a metric may be missing from some."""
    merged: MetricSums = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name] + metric if name in merged else metric
    return merged


def pack(metrics: MetricSums) -> tuple[Tensor, Tensor]:
    """Two flat float64 tensors, in the order of the sorted names: sums, to be added over ranks, and maxima.

    Ranks must hold the same names, which they do when each ran the same losses, on empty micro-batches at
    least.
    """
    ordered = [metrics[name] for name in sorted(metrics)]
    # Even where one of the two is empty, a collective wants it on the right device.
    nothing = ordered[0].values[:0] if ordered else torch.empty(0, dtype=torch.float64)
    sums = [metric.values for metric in ordered if metric.kind not in _SIGN]
    maxima = [_SIGN[metric.kind] * metric.values for metric in ordered if metric.kind in _SIGN]
    return torch.cat([nothing, *sums]), torch.cat([nothing, *maxima])


def unpack(like: MetricSums, sums: Tensor, maxima: Tensor) -> MetricSums:
    """The inverse of `pack`, with the names and kinds of `like`."""
    unpacked: MetricSums = {}
    for name, metric in sorted(like.items()):
        size = len(metric.values)
        if metric.kind in _SIGN:
            values, maxima = _SIGN[metric.kind] * maxima[:size], maxima[size:]
        else:
            values, sums = sums[:size], sums[size:]
        unpacked[name] = MetricSum(metric.kind, values)
    if len(sums) or len(maxima):
        raise ValueError(
            f"{len(sums)} sums and {len(maxima)} maxima are left over: other metrics were packed"
        )
    return unpacked


def finalise(metrics: MetricSums) -> Metrics:
    """The numbers. A metric without any entries is left out: there is nothing that it could truthfully be."""
    values = {name: metric.value() for name, metric in metrics.items()}
    return {name: value for name, value in values.items() if value is not None}


_SIGN = {Kind.MAX: 1.0, Kind.MIN: -1.0}
"""The smallest x is the negative of the largest -x, so that one all-reduce does for both."""


def _nothing(kind: Kind) -> float:
    return -_SIGN[kind] * math.inf


def _moments(x: Tensor, weights: Tensor) -> Tensor:
    """[sum of w x, sum of w] in float64."""
    weights64 = weights.detach().double()
    used = torch.where(weights64 != 0, x.detach().double(), 0.0)
    return torch.stack([(used * weights64).sum(), weights64.sum()])


def _largest(x: Tensor, mask: Tensor) -> Tensor:
    """[1] float64. The extra entry makes the maximum of nothing -inf."""
    used = torch.where(mask, x.detach().double(), -math.inf)
    return torch.cat([used, used.new_full((1,), -math.inf)]).max().reshape(1)


def _explained_variance(
    count: float, error: float, error2: float, target: float, target2: float
) -> float | None:
    if count == 0:
        return None
    variance = target2 / count - (target / count) ** 2
    # What is left of a constant's variance after cancellation in float64 is 1e-16 of its square.
    if variance <= 1e-12 * target2 / count:
        return None
    return 1 - (error2 / count - (error / count) ** 2) / variance


def _stack(*scalars: Tensor) -> Tensor:
    return torch.stack([scalar.detach().double() for scalar in scalars])
