"""What each stage minimises: a model's forward pass joined to a loss of `algorithms`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlhf_ray.algorithms import ALGORITHMS
from rlhf_ray.algorithms.aggregation import loss_denominator, loss_weights
from rlhf_ray.algorithms.metrics import MetricSums
from rlhf_ray.algorithms.policy_losses import KLInLoss, PolicyLossSpec, PolicyTokens
from rlhf_ray.algorithms.preference_losses import bradley_terry_loss
from rlhf_ray.algorithms.supervised_losses import next_token_loss
from rlhf_ray.algorithms.value_losses import ValueTokens, value_loss
from rlhf_ray.config.schema import OnlineSection
from rlhf_ray.models.batching import TokenBatch, before_responses, before_targets, collate, last_positions
from rlhf_ray.types import PairBatch, Ragged, RLBatch, SFTBatch


class SFTObjective:
    """Next-token loss on the targets, mean over all targets of the batch."""

    def lengths(self, batch: SFTBatch) -> NDArray[np.int64]:
        return batch.tokens.lengths

    def denominator(self, batch: SFTBatch) -> float:
        return float(before_targets(batch.is_target).sum())

    def loss(
        self, model: nn.Module, rows: SFTBatch, packing: bool, device: torch.device
    ) -> tuple[Tensor, MetricSums]:
        stats = model(collate(rows.tokens, before_targets(rows.is_target), packing, device))
        return next_token_loss(stats.logprobs, stats.is_top)


@dataclass(frozen=True)
class PairObjective:
    """Bradley-Terry loss of the scores at the last tokens, mean over pairs."""

    center_rewards_coefficient: float

    def lengths(self, batch: PairBatch) -> NDArray[np.int64]:
        # Both answers are padded to the longer one.
        return 2 * np.maximum(batch.chosen.lengths, batch.rejected.lengths)

    def denominator(self, batch: PairBatch) -> float:
        return float(len(batch))

    def loss(
        self, model: nn.Module, rows: PairBatch, packing: bool, device: torch.device
    ) -> tuple[Tensor, MetricSums]:
        both = Ragged.concat([rows.chosen, rows.rejected])
        scores = model(collate(both, last_positions(both), packing, device))
        chosen, rejected = scores.split(len(rows)) if len(rows) else (scores, scores)
        margin = torch.as_tensor(rows.margin, device=device)
        soft_label = torch.as_tensor(rows.soft_label, device=device)
        return bradley_terry_loss(chosen, rejected, margin, soft_label, self.center_rewards_coefficient)


def response_batch(rows: RLBatch, packing: bool, device: torch.device) -> TokenBatch:
    sequences = Ragged.join(rows.prompts, rows.responses)
    return collate(sequences, before_responses(rows.prompts.lengths, sequences), packing, device)


@dataclass(frozen=True)
class _RLObjective:
    spec: OnlineSection

    def lengths(self, batch: RLBatch) -> NDArray[np.int64]:
        return batch.prompts.lengths + batch.responses.lengths

    def denominator(self, batch: RLBatch) -> float:
        offsets = torch.from_numpy(batch.responses.offsets)
        is_trained = torch.from_numpy(batch.is_trained.values)
        return float(loss_denominator(offsets, is_trained, self.spec.loss_aggregation))

    def weights(self, rows: RLBatch, device: torch.device) -> Tensor:
        offsets = torch.from_numpy(rows.responses.offsets)
        is_trained = torch.from_numpy(rows.is_trained.values)
        return loss_weights(offsets, is_trained, self.spec.loss_aggregation).to(device)


@dataclass(frozen=True)
class PolicyObjective(_RLObjective):
    """The algorithm's policy loss.

    Fields:
        kl_coef: this step's coefficient; used here where the KL belongs in the loss.
    """

    kl_coef: float

    def loss(
        self, model: nn.Module, rows: RLBatch, packing: bool, device: torch.device
    ) -> tuple[Tensor, MetricSums]:
        stats = model(
            response_batch(rows, packing, device),
            temperature=self.spec.temperature,
            entropy_has_grad=self.spec.entropy_coef > 0,
        )
        tokens = PolicyTokens(
            logprobs=stats.logprobs,
            entropy=stats.entropy,
            old_logprobs=torch.as_tensor(rows.old_logprobs.values, device=device),
            ref_logprobs=torch.as_tensor(rows.ref_logprobs.values, device=device),
            advantages=torch.as_tensor(rows.advantages.values, device=device),
            weights=self.weights(rows, device),
        )
        kl = None
        if self.spec.kl_placement == "loss" and self.kl_coef > 0:
            assert self.spec.kl_estimator != "k1"  # the schema refuses it
            kl = KLInLoss(self.kl_coef, self.spec.kl_estimator)
        loss_spec = PolicyLossSpec(
            self.spec.cliprange, self.spec.cliprange, entropy_coef=self.spec.entropy_coef, kl=kl
        )
        return ALGORITHMS[self.spec.algorithm].policy_loss(tokens, loss_spec)


@dataclass(frozen=True)
class ValueObjective(_RLObjective):
    """Clipped squared error to the returns."""

    def loss(
        self, model: nn.Module, rows: RLBatch, packing: bool, device: torch.device
    ) -> tuple[Tensor, MetricSums]:
        tokens = ValueTokens(
            values=model(response_batch(rows, packing, device)),
            old_values=torch.as_tensor(rows.values.values, device=device),
            returns=torch.as_tensor(rows.returns.values, device=device),
            weights=self.weights(rows, device),
        )
        return value_loss(tokens, self.spec.cliprange_value)
