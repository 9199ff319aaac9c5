"""Generation that is never drained: groups come and go, and weights change under those in flight."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from rlhf_ray.engines.generation import (
    UNKNOWN_VERSION,
    Ask,
    Sample,
    SteppedGenerator,
    assemble_rollouts,
    check_samples,
    make_requests,
)
from rlhf_ray.engines.stepping import SteppingLoop
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.types import Array, Prompts, Ragged, Rollouts, SamplingSpec

T = TypeVar("T")


class StreamingGenerator:
    """Plays the part of an engine, with calls that run beside each other: a group of answers is there when
    its last token is, whatever else the engine is at.

    Between `start_weight_update` and `finish_weight_update` the engine stands still. Answers that are under
    way then go on with the new weights; each token keeps the version that sampled it.
    """

    def __init__(self, engine: str, arguments: dict[str, object]) -> None:
        """
        Args:
            engine: `module:Class` of a `SteppedGenerator`. arguments: its own.
        """
        module, _, name = engine.partition(":")

        def build() -> SteppedGenerator:
            built: SteppedGenerator = getattr(importlib.import_module(module), name)(**arguments)
            self._engine = built
            return built

        self._loop: SteppingLoop[Ask, Sample | Array] = SteppingLoop(build)
        self._has_weights = self._engine.version != UNKNOWN_VERSION

    async def generate(
        self, prompts: Prompts, sampling: SamplingSpec, seed: int, ticket: int | None = None
    ) -> Rollouts | None:
        """As `TokenGenerator.generate`; None if it was given up.

        Args:
            ticket: by which `abort` knows these answers.
        """
        if not self._has_weights:
            raise WeightSyncError(
                "the engine was asked to generate before the trainer published weights to it"
            )
        requests = make_requests(prompts, sampling.num_generations, seed)
        self._engine.check_lengths(requests, sampling)
        answers = await asyncio.wrap_future(
            self._loop.submit([Ask(request.token_ids, request, sampling) for request in requests], ticket)
        )
        if answers is None:
            return None
        samples = [answer for answer in answers if isinstance(answer, Sample)]
        check_samples(requests, samples)
        return assemble_rollouts(prompts, sampling.num_generations, samples)

    async def abort(self, tickets: list[int]) -> None:
        """Give up the answers that were begun with these tickets."""
        await asyncio.wrap_future(self._loop.abort(tickets))

    async def token_logprobs(self, sequences: Ragged) -> Ragged:
        """As `TokenGenerator.token_logprobs`."""
        rows = await asyncio.wrap_future(self._loop.submit([Ask(tuple(row.tolist())) for row in sequences]))
        assert rows is not None, "they have no ticket"
        return Ragged.from_rows([row for row in rows if isinstance(row, np.ndarray)], np.float32)

    async def init_weight_transfer_engine(self, init_info: dict[str, object]) -> None:
        await self._between_steps(lambda: self._engine.init_weight_transfer_engine(init_info))

    async def start_weight_update(self) -> None:
        def start() -> None:
            self._loop.pause()
            self._engine.start_weight_update()

        await self._between_steps(start)

    async def update_weights(self, update_info: dict[str, object]) -> None:
        await self._between_steps(lambda: self._engine.update_weights(update_info))

    async def finish_weight_update(self, weight_version: str) -> None:
        def finish() -> None:
            self._engine.finish_weight_update(weight_version)
            self._loop.resume()

        await self._between_steps(finish)
        self._has_weights = True

    async def _between_steps(self, function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._loop.between_steps(function))
