"""One rank of a policy that is trained on preferences without a reward model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlhf_ray.algorithms.metrics import MetricSums
from rlhf_ray.algorithms.preference_optimisation import (
    PREFERENCE_ALGORITHMS,
    AnswerLogprobs,
    KTOSpec,
    PairAlgorithm,
    PairLogprobs,
    PairLossSpec,
    kl_estimate,
    kto_loss,
    pair_loss,
)
from rlhf_ray.algorithms.rows import row_sums
from rlhf_ray.config.schema import Layout, ModelSection, PreferenceSection
from rlhf_ray.models.batching import before_responses, collate
from rlhf_ray.models.inference import row_totals
from rlhf_ray.types import LabelledAnswers, Metrics, Ragged, ReferencedPairs, offsets_of
from rlhf_ray.workers.model_worker import WorkerSpec
from rlhf_ray.workers.objectives import OwnRows
from rlhf_ray.workers.policy import PolicyWorker


def response_logprobs(
    model: nn.Module,
    sequences: Ragged,
    prompt_lengths: NDArray[np.int64],
    layout: Layout,
    device: torch.device,
) -> Tensor:
    """[B] log-prob of each whole response, with gradient, at temperature 1."""
    is_source = before_responses(prompt_lengths, sequences)
    stats = model(collate(sequences, is_source, layout, device))
    offsets = torch.as_tensor(offsets_of(sequences.lengths - prompt_lengths), device=device)
    return row_sums(stats.logprobs, offsets)


def answer_logprobs(
    policy: Tensor, reference: NDArray[np.float32], sequences: Ragged, prompt_lengths: NDArray[np.int64]
) -> AnswerLogprobs:
    lengths = torch.as_tensor(sequences.lengths - prompt_lengths, dtype=policy.dtype, device=policy.device)
    return AnswerLogprobs(policy, torch.as_tensor(reference, device=policy.device), lengths)


@dataclass(frozen=True)
class PairsObjective(OwnRows):
    """A loss of `preference_optimisation` on both answers of each pair, mean over pairs."""

    algorithm: PairAlgorithm
    spec: PairLossSpec

    def lengths(self, batch: ReferencedPairs) -> NDArray[np.int64]:
        # Both answers are padded to the longer one.
        return 2 * np.maximum(batch.chosen.lengths, batch.rejected.lengths)

    def denominator(self, batch: ReferencedPairs) -> float:
        return float(len(batch))

    def loss(
        self, model: nn.Module, rows: ReferencedPairs, layout: Layout, device: torch.device
    ) -> tuple[Tensor, MetricSums]:
        both = Ragged.concat(rows.sides)
        logprobs = response_logprobs(model, both, np.tile(rows.prompt_lengths, 2), layout, device)
        chosen, rejected = logprobs.tensor_split(2)
        pairs = PairLogprobs(
            answer_logprobs(chosen, rows.ref_chosen, rows.chosen, rows.prompt_lengths),
            answer_logprobs(rejected, rows.ref_rejected, rows.rejected, rows.prompt_lengths),
            torch.as_tensor(rows.soft_label, device=device),
        )
        return pair_loss(self.algorithm, pairs, self.spec)


@dataclass(frozen=True)
class AnswersObjective(OwnRows):
    """KTO on single answers, mean over answers."""

    spec: KTOSpec

    def lengths(self, batch: LabelledAnswers) -> NDArray[np.int64]:
        return batch.answers.lengths

    def denominator(self, batch: LabelledAnswers) -> float:
        return float(len(batch))

    def loss(
        self, model: nn.Module, rows: LabelledAnswers, layout: Layout, device: torch.device
    ) -> tuple[Tensor, MetricSums]:
        logprobs = response_logprobs(model, rows.answers, rows.prompt_lengths, layout, device)
        answers = answer_logprobs(logprobs, rows.ref_answers, rows.answers, rows.prompt_lengths)
        return kto_loss(answers, torch.as_tensor(rows.is_desirable, device=device), self.spec)


class PreferenceWorker(PolicyWorker):
    """A policy in training on pairs, or, with KTO, on labelled answers."""

    def __init__(self, model: ModelSection, spec: WorkerSpec, section: PreferenceSection) -> None:
        super().__init__(model, spec)
        self.section = section
        self.algorithm = PREFERENCE_ALGORITHMS[section.algorithm]

    def train_pairs(self, batch: ReferencedPairs) -> Metrics:
        assert isinstance(self.algorithm, PairAlgorithm)
        section = self.section
        spec = PairLossSpec(section.effective_beta, section.label_smoothing, section.simpo_gamma)
        return self.update(PairsObjective(self.algorithm, spec), batch)

    def train_answers(self, batch: LabelledAnswers) -> Metrics:
        """The KL estimate belongs to the whole batch, so it is made before the first micro-batch."""
        section = self.section
        mismatched = self._answers(batch.mismatched, batch.ref_mismatched, batch.prompt_lengths)
        kl = kl_estimate(mismatched)
        spec = KTOSpec(section.effective_beta, section.desirable_weight, section.undesirable_weight, kl)
        metrics = self.update(AnswersObjective(spec), batch)
        if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return {**metrics, "preference/kl": kl}

    def score_pairs(self, batch: ReferencedPairs) -> tuple[Ragged, Ragged]:
        """Implicit rewards of the chosen and the rejected answers, one value a row."""
        reference = np.concatenate([batch.ref_chosen, batch.ref_rejected])
        rewards = self._rewards(Ragged.concat(batch.sides), reference, np.tile(batch.prompt_lengths, 2))
        ones = [1] * len(batch)
        chosen, rejected = np.split(rewards, 2)
        return Ragged.from_lengths(chosen, ones), Ragged.from_lengths(rejected, ones)

    def score_answers(self, batch: LabelledAnswers) -> Ragged:
        """Implicit rewards, one value a row."""
        rewards = self._rewards(batch.answers, batch.ref_answers, batch.prompt_lengths)
        return Ragged.from_lengths(rewards, [1] * len(batch))

    def _rewards(
        self, sequences: Ragged, reference: NDArray[np.float32], prompt_lengths: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        scores = self.algorithm.score(self._answers(sequences, reference, prompt_lengths))
        return (self.section.effective_beta * scores).numpy()

    def _answers(
        self, sequences: Ragged, reference: NDArray[np.float32], prompt_lengths: NDArray[np.int64]
    ) -> AnswerLogprobs:
        """Without gradient; on every rank, for all rows."""
        totals = row_totals(self._logprobs(sequences, prompt_lengths, 1.0))
        return answer_logprobs(torch.from_numpy(totals), reference, sequences, prompt_lengths)
