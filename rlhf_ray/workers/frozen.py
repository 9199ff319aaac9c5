"""Models that are only read: the reference of the KL penalty, and reward models."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.config.schema import ModelSection, TrainingSection
from rlhf_ray.models.batching import TokenBatch, before_responses
from rlhf_ray.models.heads import PolicyModel
from rlhf_ray.models.inference import forward_rows, in_row_order, row_totals
from rlhf_ray.models.loading import load_policy_model
from rlhf_ray.models.planning import plan_micro_batches
from rlhf_ray.models.sharing import check_sharing
from rlhf_ray.types import Ragged, Rollouts, TwoAnswers

Referenced = TypeVar("Referenced", bound=TwoAnswers)


class FrozenModel:
    """Forward passes with the trainer's own precision, so that equal weights give equal numbers."""

    def __init__(self, module: torch.nn.Module, training: TrainingSection, device: torch.device) -> None:
        self.module = module.eval().requires_grad_(False).to(device)
        self.training = training
        self.device = device

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.training.precision == "mixed"
        )

    def forward_all(
        self,
        sequences: Ragged,
        is_source: NDArray[np.bool_],
        prompts: Ragged | None = None,
        **options: float,
    ) -> Ragged:
        """As `ModelWorker.forward_all`. options: of the module's forward."""

        def forward(batch: TokenBatch) -> torch.Tensor:
            out = self.module(batch, **options)
            return out if isinstance(out, torch.Tensor) else out.logprobs

        training = self.training
        shared = prompts if training.share_prompts else None
        budget = training.tokens_per_micro_batch
        (micro_batches,) = plan_micro_batches(sequences.lengths, 1, budget, shared)
        with self.autocast():
            part = forward_rows(
                forward, sequences, is_source, micro_batches, training.layout, self.device, prompts
            )
        return in_row_order([part])


class ReferenceWorker:
    """Log-probs under the policy that training started from."""

    def __init__(
        self, model: ModelSection, training: TrainingSection, device: torch.device, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        module = PolicyModel(load_policy_model(model), training.lockstep_tokens)
        if training.share_prompts:
            check_sharing(module.model)
        self.model = FrozenModel(module, training, device)

    def logprobs(self, rollouts: Rollouts, temperature: float) -> Ragged:
        """At the sampler's temperature; one value a response token."""
        sequences, prompts = rollouts.sequences, rollouts.prompts
        is_source = before_responses(prompts.lengths, sequences)
        return self.model.forward_all(sequences, is_source, prompts, temperature=temperature)

    def answer(self, batch: Referenced) -> Referenced:
        """The batch with the log-probs of its answers, at temperature 1, filled in."""
        sequences = Ragged.concat(batch.sides)
        is_source = before_responses(np.tile(batch.prompt_lengths, 2), sequences)
        totals = row_totals(self.model.forward_all(sequences, is_source, temperature=1.0))
        return batch.with_reference(totals[: len(batch)], totals[len(batch) :])
