"""What becomes of a source's failures: raise, try again, or leave the samples out of training."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.schema import Reward
from rlhf_ray.errors import RewardError
from rlhf_ray.rewards.source import RewardSource, Samples, Values

T = TypeVar("T")
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before a second attempt, and at most before any."""


@dataclass(frozen=True)
class Outcome:
    """What a source said of B samples.

    Fields:
        values: NaN where it had nothing to say, or failed.
        failed: [B] bool, True where it failed.
        num_retries: how often it was asked again.
    """

    values: Values
    failed: NDArray[np.bool_]
    num_retries: int


class GuardedSource:
    """A source with its policy.

    Args:
        batch_size: samples that are asked about, and fail, together; None for all.
        repeats: whether it may do better when it is asked again.
    """

    def __init__(
        self, section: Reward, source: RewardSource, batch_size: int | None = None, *, repeats: bool = True
    ) -> None:
        self.section = section
        self.source = source
        self.batch_size = batch_size
        self.repeats = repeats

    async def score(self, samples: Samples) -> Outcome:
        """
        Raises:
            RewardError: of the source, where the policy is not to mask.
        """
        size = self.batch_size or max(1, len(samples))
        rows = np.arange(len(samples))
        batches = [samples.select(rows[start : start + size]) for start in range(0, len(samples), size)]
        if len(batches) == 1:
            return await self._attempts(samples)
        outcomes = await all_of(self._attempts(batch) for batch in batches)
        return Outcome(
            Values(np.concatenate([outcome.values.rewards for outcome in outcomes])),
            np.concatenate([outcome.failed for outcome in outcomes]),
            sum(outcome.num_retries for outcome in outcomes),
        )

    async def _attempts(self, samples: Samples) -> Outcome:
        is_final = self.section.on_error == "raise" or not self.repeats
        last = 0 if is_final else self.section.max_retries
        for attempt in range(last + 1):
            try:
                values = await self.source.score(samples)
                return Outcome(values, self._failed_rows(values, samples), attempt)
            except RewardError as error:
                print(f"attempt {attempt + 1} of {last + 1}: {error}", file=sys.stderr, flush=True)
                if attempt == last:
                    if self.section.on_error == "mask":
                        break
                    raise
            await asyncio.sleep(wait_before_retry(attempt))
        nothing = Values(np.full(len(samples), np.nan, dtype=np.float32))
        return Outcome(nothing, np.ones(len(samples), dtype=np.bool_), last)

    def _failed_rows(self, values: Values, samples: Samples) -> NDArray[np.bool_]:
        """[B]. Raises: RewardError, where they are not to be masked."""
        failed = np.zeros(len(samples), dtype=np.bool_)
        for row, reason in values.failures.items():
            failed[row] = True
            message = f"reward '{self.section.name}': prompt {samples.rollouts.prompt_ids[row]}: {reason}"
            if self.section.on_error != "mask":
                raise RewardError(message)
            print(message, file=sys.stderr, flush=True)
        return failed


def wait_before_retry(attempt: int) -> float:
    """Seconds: twice as long each time, up to half of it by chance, so that clients do not come in step."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2.0**attempt) * random.uniform(0.5, 1.0)


async def all_of(awaitables: Iterable[Coroutine[object, object, T]]) -> list[T]:
    """All results; at the first failure the others are given up."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
