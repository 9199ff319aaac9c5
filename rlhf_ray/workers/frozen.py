"""Models that are only read: the reference of the KL penalty, and the reward sources."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.config.schema import FunctionReward, ModelSection, Reward, TrainingSection
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.errors import RewardError
from rlhf_ray.models.batching import TokenBatch, before_responses, last_positions, plan_micro_batches
from rlhf_ray.models.heads import PolicyModel, ScalarModel
from rlhf_ray.models.inference import forward_rows, in_row_order
from rlhf_ray.models.loading import (
    eos_token_ids,
    load_policy_model,
    load_scalar_model,
    load_tokenizer,
)
from rlhf_ray.reporting.transcripts import answer_texts
from rlhf_ray.rewards.functions import RewardFunction
from rlhf_ray.types import Ragged, Rollouts, Scores


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

    def forward_all(self, sequences: Ragged, is_source: NDArray[np.bool_], **options: float) -> Ragged:
        def forward(batch: TokenBatch) -> torch.Tensor:
            out = self.module(batch, **options)
            return out if isinstance(out, torch.Tensor) else out.logprobs

        (micro_batches,) = plan_micro_batches(sequences.lengths, 1, self.training.tokens_per_micro_batch)
        with self.autocast():
            part = forward_rows(
                forward, sequences, is_source, micro_batches, self.training.packing, self.device
            )
        return in_row_order([part])


class ReferenceWorker:
    """Log-probs under the policy that training started from."""

    def __init__(
        self, model: ModelSection, training: TrainingSection, device: torch.device, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        module = PolicyModel(load_policy_model(model), training.tokens_per_micro_batch)
        self.model = FrozenModel(module, training, device)

    def logprobs(self, rollouts: Rollouts, temperature: float) -> Ragged:
        """At the sampler's temperature; one value a response token."""
        sequences = rollouts.sequences
        is_source = before_responses(rollouts.prompts.lengths, sequences)
        return self.model.forward_all(sequences, is_source, temperature=temperature)


class RewardWorker:
    """All reward sources of a stage, and their weighted sum.

    Args:
        sources: each with, for a source of type `model`, the section of its reward model.
        has_environment: whether the rollouts bring the rewards of an environment, which count with weight 1.
    """

    def __init__(
        self,
        policy: ModelSection,
        sources: Sequence[tuple[Reward, ModelSection | None]],
        training: TrainingSection,
        device: torch.device,
        threads: int,
        has_environment: bool = False,
    ) -> None:
        torch.set_num_threads(threads)
        self.has_environment = has_environment
        self.tokenizer = load_tokenizer(policy)
        # The formatter that wrote the pairs which the reward model was trained on.
        self.formatter = ChatFormatter(self.tokenizer, eos_token_ids(policy, self.tokenizer))
        self.sources: list[tuple[Reward, FrozenModel | RewardFunction]] = []
        for source, model in sources:
            if isinstance(source, FunctionReward):
                self.sources.append((source, RewardFunction(source.name, source.function)))
            else:
                assert model is not None
                module = ScalarModel(load_scalar_model(model, seed=0))
                self.sources.append((source, FrozenModel(module, training, device)))

    def score(self, rollouts: Rollouts) -> Scores:
        """
        Raises:
            RewardError: a function raised, or returned the wrong number or kind of values; a model's score is
                not finite.
        """
        parts = {
            source.name: self._evaluate(source.name, scorer, rollouts) for source, scorer in self.sources
        }
        # NaN stands for "does not apply": it adds nothing to the total.
        total = np.zeros(len(rollouts), dtype=np.float64)
        for source, _ in self.sources:
            total += source.weight * np.nan_to_num(parts[source.name])
        if self.has_environment:
            parts["environment"] = environment_rewards(rollouts)
            total += parts["environment"]
        return Scores(total.astype(np.float32), parts)

    def _evaluate(
        self, name: str, scorer: FrozenModel | RewardFunction, rollouts: Rollouts
    ) -> NDArray[np.float32]:
        if isinstance(scorer, RewardFunction):
            return scorer(rollouts.messages, answer_texts(rollouts, self.tokenizer), rollouts.columns)
        # The very ids that were sampled. The reward model has only seen answers that end in EOS, so one that
        # the length limit cut gets it too; being cut is punished apart (missing_eos_penalty).
        eos = self.formatter.eos_token_id
        ended = [
            r if finished or r[-1] in self.formatter.eos_token_ids else np.append(r, eos)
            for r, finished in zip(rollouts.responses, rollouts.finished, strict=True)
        ]
        sequences = Ragged.join(rollouts.prompts, Ragged.from_rows(ended, np.int32))
        scores = scorer.forward_all(sequences, last_positions(sequences)).values.astype(np.float32)
        if not np.isfinite(scores).all():
            row = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise RewardError(
                f"reward '{name}': the model's score of sample {rollouts.sample_ids[row]} of prompt "
                f"{rollouts.prompt_ids[row]} is {scores[row]}"
            )
        return scores


def environment_rewards(rollouts: Rollouts) -> NDArray[np.float32]:
    """[B] sum over the turns."""
    turns = rollouts.turn_rewards
    return np.bincount(turns.row_ids, weights=turns.values, minlength=len(turns)).astype(np.float32)
