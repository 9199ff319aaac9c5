"""Metrics that do not depend on how a batch was split."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms.metrics import MetricSum, MetricSums, finalise, merge, pack, unpack

NAN = math.nan


def all_kinds(x: torch.Tensor, mask: torch.Tensor) -> MetricSums:
    return {
        "mean": MetricSum.mean(x, mask),
        "exp_mean": MetricSum.exp_mean(x, mask),
        "max": MetricSum.max(x, mask),
        "min": MetricSum.min(x, mask),
        "explained_variance": MetricSum.explained_variance(x, x.square() / 4, mask),
    }


def test_each_kind_by_hand() -> None:
    x, mask = torch.tensor([1.0, 2.0, NAN, 6.0]), torch.tensor([True, True, False, True])
    values = finalise(all_kinds(x, mask))
    assert values["mean"] == 3.0
    assert values["exp_mean"] == pytest.approx(math.exp(3))
    assert (values["max"], values["min"]) == (6.0, 1.0)
    # Targets 1, 2, 6: variance 14/3. Errors 3/4, 1, -3: mean -5/12, mean of squares 169/48.
    assert values["explained_variance"] == pytest.approx(1 - (169 / 48 - 25 / 144) / (14 / 3))


def test_a_weighted_mean_by_hand() -> None:
    metric = MetricSum.mean(torch.tensor([10.0, NAN, 1.0]), torch.tensor([0.25, 0.0, 0.75]))
    assert metric.value() == pytest.approx(3.25)
    assert MetricSum.ratio(torch.tensor(6.0), torch.tensor(4)).value() == 1.5


def test_an_empty_contribution_changes_nothing_and_is_never_nan() -> None:
    x = torch.tensor([1.0, 2.0, 6.0])
    full = all_kinds(x, torch.ones(3, dtype=torch.bool))
    masked = all_kinds(torch.full((3,), NAN), torch.zeros(3, dtype=torch.bool))
    none = all_kinds(torch.empty(0), torch.empty(0, dtype=torch.bool))
    assert finalise(merge([masked, full, none])) == finalise(full)
    assert finalise(masked) == finalise(none) == {}


def test_max_and_min_of_real_infinities_are_kept() -> None:
    x, mask = torch.tensor([math.inf, -math.inf]), torch.tensor([True, True])
    assert MetricSum.max(x, mask).value() == math.inf
    assert MetricSum.min(x, mask).value() == -math.inf


def test_explained_variance_of_a_constant_is_left_out() -> None:
    targets = torch.full((5,), 0.1)
    metric = MetricSum.explained_variance(targets, torch.arange(5.0), torch.ones(5, dtype=torch.bool))
    assert metric.value() is None


def test_explained_variance_of_shifted_predictions_is_one() -> None:
    targets = torch.tensor([1.0, 5.0, 2.0])
    metric = MetricSum.explained_variance(targets, targets - 100, torch.ones(3, dtype=torch.bool))
    assert metric.value() == pytest.approx(1.0)


@pytest.mark.parametrize("cuts", [[], [4], [1, 2, 3, 9], [0, 5, 5, 10]])
def test_any_split_over_micro_batches_and_ranks_gives_the_same(cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10, generator=generator)
    mask = torch.rand(10, generator=generator) < 0.7
    whole = finalise(all_kinds(x, mask))
    parts = zip(torch.tensor_split(x, cuts), torch.tensor_split(mask, cuts), strict=True)
    metrics = [all_kinds(*part) for part in parts]
    assert finalise(merge(metrics)) == pytest.approx(whole, rel=1e-12)
    packed = [pack(part) for part in metrics]
    sums = torch.stack([sums for sums, _ in packed]).sum(0)
    maxima = torch.stack([maxima for _, maxima in packed]).amax(0)
    assert finalise(unpack(metrics[0], sums, maxima)) == pytest.approx(whole, rel=1e-12)
    used = x[mask].double().numpy()
    error = used - used**2 / 4
    assert whole["explained_variance"] == pytest.approx(1 - np.var(error) / np.var(used), abs=1e-6)


def test_packing_does_not_depend_on_the_order_of_insertion() -> None:
    metrics = all_kinds(torch.tensor([3.0, 4.0]), torch.tensor([True, True]))
    backwards = dict(reversed(metrics.items()))
    assert all(torch.equal(a, b) for a, b in zip(pack(metrics), pack(backwards), strict=True))
    assert [len(part) for part in pack({"x": metrics["mean"]})] == [2, 0]


def test_unpacking_other_metrics_is_an_error() -> None:
    metrics = all_kinds(torch.tensor([3.0, 4.0]), torch.tensor([True, True]))
    with pytest.raises(ValueError, match="2 sums and 1 maxima are left over"):
        unpack({k: v for k, v in metrics.items() if k not in ("mean", "max")}, *pack(metrics))


def test_kinds_do_not_mix() -> None:
    metrics = all_kinds(torch.tensor([3.0]), torch.tensor([True]))
    with pytest.raises(ValueError, match="kind max cannot be added to one of min"):
        metrics["max"] + metrics["min"]


def test_metrics_hold_no_graph() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    metrics = all_kinds(x, torch.tensor([True, True]))
    assert not any(metric.values.requires_grad for metric in metrics.values())
