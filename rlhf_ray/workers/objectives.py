"""What each stage minimises: a model's forward pass joined to a loss of `algorithms`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlhf_ray.algorithms.aggregation import loss_denominator, loss_weights
from rlhf_ray.algorithms.correction import correction_metrics, importance_weights, remaining_weights
from rlhf_ray.algorithms.kl import reference_kl_metrics
from rlhf_ray.algorithms.metrics import MetricSums
from rlhf_ray.algorithms.mismatch import mismatch_metrics
from rlhf_ray.algorithms.policy_losses import PolicyTokens
from rlhf_ray.algorithms.preference_losses import bradley_terry_loss
from rlhf_ray.algorithms.supervised_losses import next_token_loss
from rlhf_ray.algorithms.value_losses import ValueTokens, value_loss
from rlhf_ray.config.schema import Layout, OnlineSection
from rlhf_ray.models.batching import TokenBatch, before_responses, before_targets, collate, last_positions
from rlhf_ray.types import PairBatch, Ragged, RLBatch, Rows, SFTBatch
from rlhf_ray.workers.algorithm import algorithm_of, correction_of, policy_loss_spec


class OwnRows:
    """Mixin for objectives whose rows share nothing."""

    def prompts(self, batch: Rows) -> None:
        return None


class SFTObjective(OwnRows):
    """Next-token loss on the targets, mean over all targets of the batch."""

    def lengths(self, batch: SFTBatch) -> NDArray[np.int64]:
        return batch.tokens.lengths

    def denominator(self, batch: SFTBatch) -> float:
        return float(before_targets(batch.is_target).sum())

    def loss(
        self, model: nn.Module, rows: SFTBatch, layout: Layout, device: torch.device
    ) -> tuple[Tensor, MetricSums]:
        stats = model(collate(rows.tokens, before_targets(rows.is_target), layout, device))
        return next_token_loss(stats.logprobs, stats.is_top)


@dataclass(frozen=True)
class PairObjective(OwnRows):
    """Bradley-Terry loss of the scores at the last tokens, mean over pairs."""

    center_rewards_coefficient: float

    def lengths(self, batch: PairBatch) -> NDArray[np.int64]:
        # Both answers are padded to the longer one.
        return 2 * np.maximum(batch.chosen.lengths, batch.rejected.lengths)

    def denominator(self, batch: PairBatch) -> float:
        return float(len(batch))

    def loss(
        self, model: nn.Module, rows: PairBatch, layout: Layout, device: torch.device
    ) -> tuple[Tensor, MetricSums]:
        both = Ragged.concat([rows.chosen, rows.rejected])
        scores = model(collate(both, last_positions(both), layout, device))
        chosen, rejected = scores.split(len(rows)) if len(rows) else (scores, scores)
        margin = torch.as_tensor(rows.margin, device=device)
        soft_label = torch.as_tensor(rows.soft_label, device=device)
        return bradley_terry_loss(chosen, rejected, margin, soft_label, self.center_rewards_coefficient)


def response_batch(rows: RLBatch, layout: Layout, device: torch.device) -> TokenBatch:
    sequences = Ragged.join(rows.prompts, rows.responses)
    is_source = before_responses(rows.prompts.lengths, sequences)
    return collate(sequences, is_source, layout, device, rows.prompts)


@dataclass(frozen=True)
class _RLObjective:
    spec: OnlineSection

    def lengths(self, batch: RLBatch) -> NDArray[np.int64]:
        return batch.prompts.lengths + batch.responses.lengths

    def prompts(self, batch: RLBatch) -> Ragged:
        return batch.prompts

    def denominator(self, batch: RLBatch) -> float:
        offsets = torch.from_numpy(batch.responses.offsets)
        is_trained = torch.from_numpy(batch.is_trained.values)
        aggregation, longest = self.spec.recipe.loss_aggregation, self.spec.max_response_length
        # A batch whose episodes all failed has nothing to train on, and a loss of 0.
        return float(max(1, loss_denominator(offsets, is_trained, aggregation, longest)))

    def weights(self, rows: RLBatch, device: torch.device) -> Tensor:
        offsets = torch.from_numpy(rows.responses.offsets)
        is_trained = torch.from_numpy(rows.is_trained.values)
        return loss_weights(offsets, is_trained, self.spec.recipe.loss_aggregation).to(device)


@dataclass(frozen=True)
class PolicyObjective(_RLObjective):
    """The algorithm's policy loss.

    Fields:
        kl_coef: this step's coefficient; used here where the KL belongs in the loss.
    """

    kl_coef: float

    def loss(
        self, model: nn.Module, rows: RLBatch, layout: Layout, device: torch.device
    ) -> tuple[Tensor, MetricSums]:
        stats = model(
            response_batch(rows, layout, device),
            temperature=self.spec.temperature,
            entropy_has_grad=self.spec.entropy_coef > 0,
        )
        current = stats.logprobs.detach()
        weights = self._importance_weights(rows, current)
        is_current = self.spec.old_logprobs == "update"
        tokens = PolicyTokens(
            logprobs=stats.logprobs,
            entropy=stats.entropy,
            old_logprobs=current if is_current else torch.as_tensor(rows.old_logprobs.values, device=device),
            ref_logprobs=torch.as_tensor(rows.ref_logprobs.values, device=device),
            advantages=torch.as_tensor(rows.advantages.values, device=device),
            weights=self.weights(rows, device),
            importance_weights=weights,
            offsets=torch.from_numpy(rows.responses.offsets).to(device),
        )
        loss, metrics = algorithm_of(self.spec).policy_loss(tokens, policy_loss_spec(self.spec, self.kl_coef))
        if is_current:
            metrics = {**metrics, **self._before_update(rows, current, weights)}
        return loss, metrics

    def _importance_weights(self, rows: RLBatch, logprobs: Tensor) -> Tensor:
        """Those of the batch, made of the log-probs before the update; or of these, which are just those; or
        what is left of them where the loss itself compares these with the sampler's."""
        device = logprobs.device
        correction = correction_of(self.spec)
        if self.spec.old_logprobs == "forward" or correction is None:
            return torch.as_tensor(rows.importance_weights.values, device=device)
        sampler = torch.as_tensor(rows.old_logprobs.values, device=device)
        is_trained = torch.as_tensor(rows.is_trained.values, device=device)
        offsets = torch.from_numpy(rows.responses.offsets).to(device)
        weigh = importance_weights if self.spec.old_logprobs == "update" else remaining_weights
        return weigh(logprobs, sampler, offsets, is_trained, correction)

    def _before_update(self, rows: RLBatch, logprobs: Tensor, weights: Tensor) -> MetricSums:
        """What `ExperienceWorker` says of the trainer's log-probs where it has them."""
        device = logprobs.device
        offsets = torch.from_numpy(rows.responses.offsets).to(device)
        is_trained = torch.as_tensor(rows.is_trained.values, device=device)
        sampler = torch.as_tensor(rows.old_logprobs.values, device=device)
        metrics = mismatch_metrics(logprobs, sampler, torch.ones_like(is_trained))
        if correction_of(self.spec) is not None:
            metrics |= correction_metrics(weights, is_trained)
        if self.spec.uses_reference:
            reference = torch.as_tensor(rows.ref_logprobs.values, device=device)
            metrics |= reference_kl_metrics(logprobs, reference, offsets)
        return metrics


@dataclass(frozen=True)
class ValueObjective(_RLObjective):
    """Clipped squared error to the returns."""

    def loss(
        self, model: nn.Module, rows: RLBatch, layout: Layout, device: torch.device
    ) -> tuple[Tensor, MetricSums]:
        tokens = ValueTokens(
            values=model(response_batch(rows, layout, device)),
            old_values=torch.as_tensor(rows.values.values, device=device),
            returns=torch.as_tensor(rows.returns.values, device=device),
            weights=self.weights(rows, device),
        )
        return value_loss(tokens, self.spec.cliprange_value)
