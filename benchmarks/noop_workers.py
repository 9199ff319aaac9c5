"""Workers that do no work, in the roles' actors, while `control-plane` measures all that is around them.

Each has the methods that the role's real worker has, and returns arrays of the real types and sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from actors.engine_calls import RemoteEngineCalls
from rlhf_ray.reporting.evaluation import EvalRecord
from rlhf_ray.types import Metrics, Prompts, Ragged, RLBatch, Rollouts, SamplingSpec, Scores, StepInfo


class RecordedEngine:
    """Returns recorded responses: every prompt gets one of the section's longest length."""

    def __init__(self) -> None:
        self.version = 0
        self._recorded: tuple[tuple[int, int], Rollouts] | None = None

    def generate(self, prompts: Prompts, sampling: SamplingSpec, seed: int) -> Rollouts:
        key = (len(prompts) * sampling.num_generations, sampling.max_completion_length)
        if self._recorded is None or self._recorded[0] != key:
            self._recorded = key, recorded_rollouts(prompts, sampling)
        recorded = self._recorded[1]
        rows = np.repeat(np.arange(len(prompts)), sampling.num_generations)
        versions = np.full(len(recorded.responses.values), self.version, dtype=np.int32)
        return replace(
            recorded,
            prompt_ids=prompts.ids[rows],
            prompts=prompts.token_ids.select(rows),
            versions=recorded.responses.with_values(versions),
            columns=tuple(prompts.columns[row] for row in rows),
            messages=tuple(prompts.messages[row] for row in rows),
        )

    def token_logprobs(self, sequences: Ragged) -> Ragged:
        return zeros_after_first(sequences)

    def init_weight_transfer_engine(self, init_info: dict[str, object]) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, object]) -> None:
        pass

    def finish_weight_update(self, weight_version: str) -> None:
        self.version = int(weight_version)


def recorded_rollouts(prompts: Prompts, sampling: SamplingSpec) -> Rollouts:
    generator = np.random.default_rng(0)
    rows = np.repeat(np.arange(len(prompts)), sampling.num_generations)
    lengths = np.full(len(rows), sampling.max_completion_length)
    size = int(lengths.sum())
    responses = Ragged.from_lengths(generator.integers(3, 250, size, dtype=np.int32), lengths)
    return Rollouts(
        prompt_ids=prompts.ids[rows],
        sample_ids=np.tile(np.arange(sampling.num_generations), len(prompts)),
        prompts=prompts.token_ids.select(rows),
        responses=responses,
        logprobs=responses.with_values(-generator.random(size, dtype=np.float32)),
        versions=responses.filled(np.int32(0)),
        is_sampled=responses.filled(np.True_),
        turn_rewards=responses.filled(np.float32(0)),
        finished=np.ones(len(rows), dtype=np.bool_),
        failures=(None,) * len(rows),
        columns=(),
        messages=(),
    )


def zeros_after_first(sequences: Ragged) -> Ragged:
    lengths = sequences.lengths - 1
    return Ragged.from_lengths(np.zeros(int(lengths.sum()), dtype=np.float32), lengths)


class ConstantScorer:
    def score(self, rollouts: Rollouts) -> Scores:
        total = np.arange(len(rollouts), dtype=np.float32) % 7
        return Scores(total=total, parts={"constant": total})


class SilentModel:
    """Policy, critic or reference: says what the sampler said, and is never updated.

    Publishing tells every engine what a real one tells it, without the weights between.
    """

    def __init__(self) -> None:
        self._engines: Sequence[RemoteEngineCalls] = ()

    def connect(self, engines: Sequence[RemoteEngineCalls]) -> None:
        self._engines = engines

    def logprobs(self, *chunks: Rollouts | float) -> Ragged:
        """Of all chunks; the reference is told a temperature after its one chunk."""
        return Ragged.concat([chunk.logprobs for chunk in chunks if isinstance(chunk, Rollouts)])

    def values(self, *chunks: Rollouts) -> Ragged:
        return Ragged.concat([chunk.logprobs for chunk in chunks])

    def train_rl(self, batch: RLBatch, *step_and_coefficient: float) -> Metrics:
        return {"loss": float(batch.advantages.values[0])}

    def publish(self, version: int) -> Metrics:
        for pending in [engine.start_weight_update() for engine in self._engines]:
            pending.result()
        for pending in [engine.finish_weight_update(str(version)) for engine in self._engines]:
            pending.result()
        return {}

    def probe(self, sequences: Ragged) -> Ragged:
        return zeros_after_first(sequences)


class CopyingExperience:
    """Batches of the right sizes, made of what arrived; nothing is computed and nothing is kept."""

    def prepare(
        self,
        info: StepInfo,
        num_chunks: int,
        old_logprobs: Ragged,
        values: Ragged,
        *columns: Rollouts | Scores | Ragged,
    ) -> tuple[RLBatch, Metrics]:
        rollouts = Rollouts.concat([column for column in columns if isinstance(column, Rollouts)])
        reference = Ragged.concat([column for column in columns if isinstance(column, Ragged)])
        assert (rollouts.versions.values == info.version).all()
        # Copies, as columns that were computed would be: one array that stands in two places is sent once.
        batch = RLBatch(
            prompt_ids=rollouts.prompt_ids,
            prompts=rollouts.prompts,
            responses=rollouts.responses,
            old_logprobs=old_logprobs,
            ref_logprobs=reference,
            values=values,
            advantages=values.with_values(values.values.copy()),
            returns=values.with_values(values.values.copy()),
            importance_weights=values.with_values(values.values.copy()),
            is_trained=rollouts.is_sampled,
        )
        tokens = len(rollouts.responses.values)
        return batch, {
            "kl/per_sequence": 0.0,
            "perf/num_samples": float(len(rollouts)),
            "perf/generated_tokens": float(tokens),
        }

    def evaluate(self, logprobs: Ragged | None, *columns: Rollouts | Scores | Ragged) -> list[EvalRecord]:
        return []

    def state_dict(self) -> dict[str, float]:
        return {}
