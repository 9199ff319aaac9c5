"""One rank of a model with a number a token: the critic, and the reward model while it is trained."""

from __future__ import annotations

from rlhf_ray.config.schema import ModelSection, OnlineSection, RewardSection
from rlhf_ray.engines.partitioned import whole
from rlhf_ray.models.batching import before_responses, last_positions
from rlhf_ray.models.heads import ScalarModel
from rlhf_ray.models.loading import load_scalar_model, load_tokenizer
from rlhf_ray.types import Metrics, PairBatch, Ragged, RLBatch, Rollouts
from rlhf_ray.workers.model_worker import ModelWorker, WorkerSpec
from rlhf_ray.workers.objectives import PairObjective, ValueObjective


class CriticWorker(ModelWorker):
    """The value of the state before each response token. Temperature has no place here."""

    def __init__(self, model: ModelSection, spec: WorkerSpec, online: OnlineSection) -> None:
        super().__init__("critic", lambda: _scalar_model(model, spec), load_tokenizer(model), spec)
        self.online = online

    def values(self, *chunks: Rollouts) -> Ragged:
        """One value a response token, chunk after chunk."""
        rollouts = Rollouts.concat(chunks)
        sequences, prompts = rollouts.sequences, rollouts.prompts
        is_source = before_responses(prompts.lengths, sequences)
        return self.forward_all(self.engine.engine, sequences, is_source, prompts)

    def train_rl(self, batch: RLBatch, step: int) -> Metrics:
        objective = ValueObjective(self.online)
        return self.update(objective, batch, self.online.num_mini_batches, self.online.num_ppo_epochs, step)


class RewardTrainerWorker(ModelWorker):
    """A reward model in training on preference pairs."""

    def __init__(self, model: ModelSection, spec: WorkerSpec, section: RewardSection) -> None:
        super().__init__("reward", lambda: _scalar_model(model, spec), load_tokenizer(model), spec)
        self.objective = PairObjective(section.center_rewards_coefficient)

    def train_pairs(self, batch: PairBatch) -> Metrics:
        return self.update(self.objective, batch)

    def score_pairs(self, batch: PairBatch) -> tuple[Ragged, Ragged]:
        """Scores of the chosen and the rejected answers, one value a row."""
        both = Ragged.concat([batch.chosen, batch.rejected])
        scores = self.forward_all(self.engine.engine, both, last_positions(both)).values
        ones = [1] * len(batch)
        return Ragged.from_lengths(scores[: len(batch)], ones), Ragged.from_lengths(
            scores[len(batch) :], ones
        )


def _scalar_model(model: ModelSection, spec: WorkerSpec) -> ScalarModel:
    return ScalarModel(load_scalar_model(model, spec.seed, attention=spec.training.attention, whole=whole))
