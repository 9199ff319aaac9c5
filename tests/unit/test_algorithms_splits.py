"""One global denominator: gradients and metrics are the same for every split into micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.aggregation import Aggregation, loss_denominator, loss_weights
from rlhf_ray.algorithms.metrics import MetricSums, finalise, merge, pack, unpack
from rlhf_ray.algorithms.policy_losses import (
    KLInLoss,
    PolicyLossSpec,
    PolicyTokens,
    cispo_policy_loss,
    gspo_policy_loss,
    likelihood_loss,
    ppo_policy_loss,
)
from rlhf_ray.algorithms.preference_losses import bradley_terry_loss
from rlhf_ray.algorithms.table import PolicyLossFunction
from rlhf_ray.algorithms.value_losses import ValueTokens, value_loss
from rlhf_ray.types import Metrics, Ragged

LENGTHS = [7, 1, 12, 3, 3, 9, 2, 5]
SPLITS = {
    "1x8": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "2x4": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "8x1": [[i] for i in range(8)],
    "uneven, shuffled, one empty": [[6, 2], [], [5], [0, 1, 3, 7, 4]],
}
SPEC = PolicyLossSpec(0.1, 0.2, entropy_coef=0.05, kl=KLInLoss(0.3, "k2"))
Outcome = tuple[Tensor, Metrics]
LossOfPart = Callable[["Batch", Tensor, "Part"], tuple[Tensor, MetricSums]]


class Batch:
    """Eight rows of uneven lengths. Every prediction is a linear function of features of its token."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        num_tokens = sum(LENGTHS)
        self.tokens = Ragged.from_lengths(np.arange(num_tokens), LENGTHS)
        self.features = torch.randn((num_tokens, 4), generator=generator, dtype=torch.float64)
        self.constants = torch.randn((4, num_tokens), generator=generator, dtype=torch.float64)
        self.is_trained = torch.rand(num_tokens, generator=generator) < 0.8
        self.is_trained[self.tokens.offsets[3] : self.tokens.offsets[4]] = False  # a whole row

    def part(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Token indices and offsets of some of the rows."""
        if not rows:
            return torch.empty(0, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        selected = self.tokens.select(rows)
        return torch.from_numpy(selected.values), torch.from_numpy(selected.offsets)


@dataclass(frozen=True)
class Part:
    """A micro-batch: indices of its tokens, its rows and its weights."""

    index: Tensor
    offsets: Tensor
    weights: Tensor


def policy_loss_of(policy_loss: PolicyLossFunction) -> LossOfPart:
    def loss(batch: Batch, theta: Tensor, part: Part) -> tuple[Tensor, MetricSums]:
        logprobs = batch.features[part.index] @ theta
        old, ref, advantages, log_importance = batch.constants[:, part.index]
        columns = (logprobs, logprobs.sin(), old, ref, advantages, part.weights)
        return policy_loss(PolicyTokens(*columns, log_importance.exp(), part.offsets), SPEC)

    return loss


def loss_of_values(batch: Batch, theta: Tensor, part: Part) -> tuple[Tensor, MetricSums]:
    old, returns, _, _ = batch.constants[:, part.index]
    return value_loss(ValueTokens(batch.features[part.index] @ theta, old, returns, part.weights), 0.2)


PPO = policy_loss_of(ppo_policy_loss)
LOSSES = {
    "ppo": PPO,
    "gspo": policy_loss_of(gspo_policy_loss),
    "cispo": policy_loss_of(cispo_policy_loss),
    "likelihood": policy_loss_of(likelihood_loss),
    "value": loss_of_values,
}


def train(
    loss_of: LossOfPart, split: list[list[int]], aggregation: Aggregation, num_ranks: int = 1
) -> Outcome:
    """Gradient and metrics of a step that runs each list of rows as a micro-batch, dealt out to ranks."""
    batch = Batch()
    whole = torch.from_numpy(batch.tokens.offsets)
    denominator = loss_denominator(whole, batch.is_trained, aggregation, max_length=12)
    theta = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    of_ranks: list[list[MetricSums]] = [[] for _ in range(num_ranks)]
    for number, rows in enumerate(split):
        index, offsets = batch.part(rows)
        weights = loss_weights(offsets, batch.is_trained[index], aggregation)
        loss, metrics = loss_of(batch, theta, Part(index, offsets, weights))
        (loss / denominator).backward()
        of_ranks[number % num_ranks].append(metrics)
    merged = [merge(metrics) for metrics in of_ranks]
    sums, maxima = zip(*(pack(metrics) for metrics in merged), strict=True)
    reduced = unpack(merged[0], torch.stack(sums).sum(0), torch.stack(maxima).amax(0))
    assert theta.grad is not None
    return theta.grad, finalise(reduced)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("split", SPLITS)
def test_gradients_and_metrics_do_not_depend_on_the_split(
    name: str, aggregation: Aggregation, split: str
) -> None:
    gradient, metrics = train(LOSSES[name], SPLITS["1x8"], aggregation)
    other_gradient, other_metrics = train(LOSSES[name], SPLITS[split], aggregation)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-6, atol=1e-9)
    assert other_metrics == pytest.approx(metrics, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("split", ["2x4", "8x1", "uneven, shuffled, one empty"])
def test_two_ranks_give_the_same(name: str, split: str) -> None:
    gradient, metrics = train(LOSSES[name], SPLITS["1x8"], "token")
    other_gradient, other_metrics = train(LOSSES[name], SPLITS[split], "token", num_ranks=2)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-12, atol=1e-14)
    assert other_metrics == pytest.approx(metrics, rel=1e-12)


def test_token_and_sequence_means_differ_on_uneven_rows() -> None:
    token, _ = train(PPO, SPLITS["1x8"], "token")
    sequence, _ = train(PPO, SPLITS["1x8"], "sequence")
    assert (token - sequence).abs().max() > 1e-3


def test_sequence_mean_against_row_by_row() -> None:
    """The mean of the gradients of rows that are trained alone, each by its own token mean."""
    batch = Batch()
    gradients = []
    for row in range(8):
        index, offsets = batch.part([row])
        count = loss_denominator(offsets, batch.is_trained[index], "token", max_length=12)
        if count == 0:
            continue
        theta = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
        weights = loss_weights(offsets, batch.is_trained[index], "token")
        loss, _ = PPO(batch, theta, Part(index, offsets, weights))
        gradients.append(torch.autograd.grad(loss / count, theta)[0])
    gradient, _ = train(PPO, SPLITS["1x8"], "sequence")
    torch.testing.assert_close(gradient, torch.stack(gradients).mean(0), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_pairs_do_not_depend_on_the_split(split: list[list[int]]) -> None:
    features = torch.randn((2, 8, 3), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    margin = torch.rand(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def run(split: list[list[int]]) -> Outcome:
        theta = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64, requires_grad=True)
        parts = []
        for rows in split:
            index = torch.tensor(rows, dtype=torch.long)
            chosen, rejected = features[:, index] @ theta
            loss, metrics = bradley_terry_loss(chosen, rejected, margin[index], 1 - margin[index] / 2, 0.01)
            (loss / 8).backward()
            parts.append(metrics)
        assert theta.grad is not None
        return theta.grad, finalise(merge(parts))

    gradient, metrics = run(SPLITS["1x8"])
    other_gradient, other_metrics = run(split)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-12, atol=1e-14)
    assert other_metrics == pytest.approx(metrics, rel=1e-12)
