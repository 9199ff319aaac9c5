"""One rank of the policy: log-probs, SFT, policy-gradient updates, and publishing its weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.config.schema import ModelSection, OnlineSection
from rlhf_ray.models.adapters import adapters_off
from rlhf_ray.models.batching import TokenBatch, before_responses
from rlhf_ray.models.heads import PolicyModel
from rlhf_ray.models.loading import load_policy_model, load_tokenizer
from rlhf_ray.types import Metrics, Ragged, RLBatch, Rollouts, SFTBatch
from rlhf_ray.weights.source import ModuleWeightSource
from rlhf_ray.weights.sync import EngineCalls, MultiEngineClient, TransferSpec, WeightPublisher
from rlhf_ray.workers.model_worker import ModelWorker, WorkerSpec
from rlhf_ray.workers.objectives import PolicyObjective, SFTObjective


class PolicyWorker(ModelWorker):
    """
    Args:
        online: the stage's section where the policy is trained by reinforcement; None for SFT.
        wire_dtype: in which weights are sent to the engines; the engines' own, so that nothing is sent in
            vain.
    """

    def __init__(
        self,
        model: ModelSection,
        spec: WorkerSpec,
        online: OnlineSection | None = None,
        wire_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        budget = spec.training.lockstep_tokens
        super().__init__(
            "policy",
            lambda: PolicyModel(load_policy_model(model, attention=spec.training.attention), budget),
            load_tokenizer(model),
            spec,
        )
        self.online = online
        self.wire_dtype = wire_dtype
        self.publisher: WeightPublisher | None = None
        self.weights: ModuleWeightSource | None = None

    def train_sft(self, batch: SFTBatch) -> Metrics:
        return self.update(SFTObjective(), batch)

    def evaluate_sft(self, batch: SFTBatch) -> Metrics:
        return self.evaluate(SFTObjective(), batch)

    def train_rl(self, batch: RLBatch, step: int, kl_coef: float) -> Metrics:
        assert self.online is not None
        objective = PolicyObjective(self.online, kl_coef)
        return self.update(objective, batch, self.online.num_mini_batches, self.online.num_ppo_epochs, step)

    def logprobs(self, *chunks: Rollouts) -> Ragged:
        """Temperature-scaled log-probs of the sampled tokens under the current weights, chunk after chunk."""
        assert self.online is not None
        rollouts = Rollouts.concat(chunks)
        return self._of_responses(rollouts, self.online.temperature)

    def reference_logprobs(self, rollouts: Rollouts, temperature: float) -> Ragged:
        """As `ReferenceWorker.logprobs` of the model that training started from: this one without its
        adapters."""
        assert isinstance(self.engine.module.model, torch.nn.Module)
        with adapters_off(self.engine.module.model):
            return self._of_responses(rollouts, temperature)

    def probe(self, sequences: Ragged) -> Ragged:
        """Log-probs at temperature 1 of the tokens after each row's first: what an engine must agree with."""
        return self._logprobs(sequences, np.ones(len(sequences), dtype=np.int64), 1.0)

    def connect(self, engines: Sequence[EngineCalls], spec: TransferSpec, tensor_parallel_size: int) -> None:
        """Join the engines in one transfer group, on every rank; an earlier group is left.

        Args:
            engines: the control plane of each engine; only rank 0 calls them.
        """
        if self.publisher is not None:
            self.publisher.close()
        client = MultiEngineClient(engines, tensor_parallel_size) if self.world.rank == 0 else None
        module = self.engine.module.model
        assert isinstance(module, torch.nn.Module)
        self.weights = ModuleWeightSource(module, self.wire_dtype, self.spec.training.zero_stage)
        self.publisher = WeightPublisher(self.weights, spec, self.world.rank, client)

    def publish(self, version: int) -> Metrics:
        """Send the current weights to every engine; called on every rank. See `WeightPublisher.publish`."""
        assert self.publisher is not None and self.weights is not None, "connect first"
        metrics = self.publisher.publish(version)
        self.weights.leave_out_frozen()
        return metrics

    def close(self) -> None:
        if self.publisher is not None:
            self.publisher.close()
        super().close()

    def _of_responses(self, rollouts: Rollouts, temperature: float) -> Ragged:
        prompts = rollouts.prompts
        return self._logprobs(rollouts.sequences, prompts.lengths, temperature, prompts)

    def _logprobs(
        self,
        sequences: Ragged,
        prompt_lengths: NDArray[np.int64],
        temperature: float,
        prompts: Ragged | None = None,
    ) -> Ragged:
        """Of the tokens after each row's first so many. prompts: as in `forward_all`."""

        def forward(batch: TokenBatch) -> torch.Tensor:
            return self.engine.engine(batch, temperature=temperature).logprobs

        return self.forward_all(forward, sequences, before_responses(prompt_lengths, sequences), prompts)
