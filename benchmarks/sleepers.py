"""Roles that sleep for as long as their work would take: everything around them is real.

How long the answers to a prompt take stands in its column `seconds`.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlhf_ray.engines.generation import Sample, assemble_rollouts
from rlhf_ray.types import Metrics, Prompts, Ragged, Rollouts, SamplingSpec, Scores, StepInfo
from rlhf_ray.workers.sampled import by_prompt
from rlhf_ray.workers.staleness import check_versions, lag_metrics

if TYPE_CHECKING:
    from rlhf_ray.weights.sync import EngineCalls


def seconds_of(prompts: Prompts) -> list[float]:
    return [float(str(columns["seconds"])) for columns in prompts.columns]


def busy_seconds(seconds: Sequence[float], slots: int) -> float:
    """Until all are done, where so many are done at a time, in order."""
    free = [0.0] * slots
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def answers(prompts: Prompts, sampling: SamplingSpec, version: int) -> Rollouts:
    """Of one token each."""
    count = len(prompts) * sampling.num_generations
    return assemble_rollouts(
        prompts, sampling.num_generations, [Sample([1], [0.0], [version], finished=True)] * count
    )


class SleepingEngine:
    """One that takes a batch, and is done when its longest answers are.

    Args:
        slots: groups that it answers at a time. sync: seconds that taking weights takes.
    """

    def __init__(self, slots: int, sync: float) -> None:
        self.slots, self.sync = slots, sync
        self.version = -1

    def generate(self, prompts: Prompts, sampling: SamplingSpec, seed: int) -> Rollouts:
        time.sleep(busy_seconds(seconds_of(prompts), self.slots))
        return answers(prompts, sampling, self.version)

    def token_logprobs(self, sequences: Ragged) -> Ragged:
        return probed(sequences)

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, object]) -> None:
        time.sleep(self.sync)

    def finish_weight_update(self, weight_version: str) -> None:
        self.version = int(weight_version)


class StreamingSleepingEngine:
    """One that takes groups, and weights, while it answers others."""

    def __init__(self, slots: int, sync: float) -> None:
        self.slots, self.sync = asyncio.Semaphore(slots), sync
        self.version = -1

    async def generate(self, prompts: Prompts, sampling: SamplingSpec, seed: int, ticket: int) -> Rollouts:
        (seconds,) = seconds_of(prompts)
        async with self.slots:
            version = self.version
            await asyncio.sleep(seconds)
        return answers(prompts, sampling, version)

    async def token_logprobs(self, sequences: Ragged) -> Ragged:
        return probed(sequences)

    async def start_weight_update(self) -> None: ...

    async def update_weights(self, update_info: dict[str, object]) -> None:
        await asyncio.sleep(self.sync)

    async def finish_weight_update(self, weight_version: str) -> None:
        self.version = int(weight_version)


def probed(sequences: Ragged) -> Ragged:
    return Ragged.from_rows([np.zeros(len(row) - 1) for row in sequences], np.float32)


class SleepingPolicy:
    """Args: train: seconds of an update."""

    def __init__(self, train: float) -> None:
        self.train = train

    def connect(self, engines: Sequence[EngineCalls]) -> None:
        # Imported here: dozens of engines live in processes that need no torch.
        from rlhf_ray.weights.sync import MultiEngineClient

        self.engines = MultiEngineClient(engines, 1)

    def logprobs(self, *chunks: Rollouts) -> Ragged:
        return Rollouts.concat(chunks).logprobs

    def train_rl(self, batch: None, step: int, kl_coef: float) -> Metrics:
        time.sleep(self.train)
        return {}

    def probe(self, sequences: Ragged) -> Ragged:
        return probed(sequences)

    def publish(self, version: int) -> Metrics:
        self.engines.start_weight_update()
        self.engines.update_weights({})
        self.engines.finish_weight_update(str(version))
        return {}


class IdleScorer:
    def score(self, rollouts: Rollouts) -> Scores:
        return Scores(np.zeros(len(rollouts), dtype=np.float32), {})


class IdleExperience:
    """Puts answers together and asserts their lag, as the real one does, and makes nothing of them."""

    def __init__(self, max_lag: int) -> None:
        self.max_lag = max_lag

    def gather(self, *chunks: Rollouts) -> Rollouts:
        return by_prompt(Rollouts.concat(chunks))

    def prepare(
        self, info: StepInfo, num_chunks: int, old: Ragged, values: None, *columns: Rollouts | Scores
    ) -> tuple[None, Metrics]:
        rollouts = Rollouts.concat([column for column in columns if isinstance(column, Rollouts)])
        check_versions(rollouts, info, self.max_lag)
        return None, lag_metrics(rollouts, info)

    def evaluate(self, logprobs: None, *columns: Rollouts | Scores) -> list[object]:
        return []

    def state_dict(self) -> dict[str, float]:
        return {}
