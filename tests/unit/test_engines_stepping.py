"""An engine on a thread of its own: groups complete apart, and weights change between two steps."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import pytest

from rlhf_ray.engines.generation import Ask, Sample, SteppedGenerator
from rlhf_ray.engines.stepping import SteppingLoop
from rlhf_ray.engines.streaming import StreamingGenerator
from rlhf_ray.errors import GenerationError, WeightSyncError
from rlhf_ray.types import Array, Ragged, SamplingSpec
from tests.samples import prompts_of


class CountingEngine(SteppedGenerator):
    """Answers a request with as many tokens as its prompt has, one a step, all of them the step's number.

    A step waits until `tick` lets it; a prompt of 13 tokens breaks the engine.
    """

    instances: ClassVar[list[CountingEngine]] = []

    def __init__(self, version: int) -> None:
        super().__init__(max_model_len=1000, version=version)
        self.permits = threading.Semaphore(0)
        self.threads: set[str] = set()
        self.under_way: dict[str, tuple[Ask, list[int], list[int]]] = {}
        self.num_steps = 0
        self.instances.append(self)

    def tick(self, count: int = 1) -> None:
        """Let so many steps be made, and wait until they are."""
        until = self.num_steps + count
        self.permits.release(count)
        while self.num_steps < until:
            time.sleep(0.001)

    def add(self, key: str, request: Ask) -> None:
        self.threads.add(threading.current_thread().name)
        self.under_way[key] = (request, [], [])

    def step(self) -> list[tuple[str, Sample | Array]]:
        self.permits.acquire()
        self.threads.add(threading.current_thread().name)
        done: list[tuple[str, Sample | Array]] = []
        for key, (ask, tokens, versions) in list(self.under_way.items()):
            if len(ask.token_ids) == 13:
                raise RuntimeError("out of luck")
            tokens.append(self.num_steps)
            versions.append(self._version)
            if ask.request is None:
                done.append((key, np.full(len(ask.token_ids) - 1, float(self._version), dtype=np.float32)))
            elif len(tokens) == len(ask.token_ids):
                done.append((key, Sample(tokens, [0.0] * len(tokens), versions, finished=True)))
        for key, _ in done:
            del self.under_way[key]
        self.num_steps += 1
        return done

    def abort(self, keys: Sequence[str]) -> None:
        for key in keys:
            del self.under_way[key]

    def rest(self) -> None:
        raise NotImplementedError

    def wake(self, weights_only: bool = False) -> None:
        raise NotImplementedError

    def token_logprobs(self, sequences: Ragged) -> Ragged:
        raise NotImplementedError

    def _sample(self, *_: object) -> list[Sample]:
        raise NotImplementedError

    def init_weight_transfer_engine(self, init_info: dict[str, object]) -> None:
        raise WeightSyncError(f"nobody at {init_info['master_address']}")

    def start_weight_update(self) -> None:
        self._version = -1

    def update_weights(self, update_info: dict[str, object]) -> None: ...

    def finish_weight_update(self, weight_version: str) -> None:
        self._version = int(weight_version)


SAMPLING = SamplingSpec(max_completion_length=50, num_generations=2)
CLASS = "tests.unit.test_engines_stepping:CountingEngine"


def streaming(version: int = 0) -> tuple[StreamingGenerator, CountingEngine]:
    generator = StreamingGenerator(CLASS, {"version": version})
    from tests.unit.test_engines_stepping import CountingEngine as Imported

    return generator, Imported.instances[-1]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_groups_complete_apart_and_new_ones_join_those_under_way() -> None:
    generator, engine = streaming()
    prompts = prompts_of("a", "abcdef", "abcd")
    lengths = prompts.token_ids.lengths.tolist()
    short, long = lengths[0], lengths[1]
    assert short < lengths[2] < long

    async def run() -> None:
        first = asyncio.create_task(generator.generate(prompts.select([1]), SAMPLING, 0))
        second = asyncio.create_task(generator.generate(prompts.select([0]), SAMPLING, 0))
        await until(lambda: len(engine.under_way) == 4)
        engine.tick(short)
        done = await second
        assert done.responses.lengths.tolist() == [short, short]
        assert not first.done()
        third = asyncio.create_task(generator.generate(prompts.select([2]), SAMPLING, 0))
        await asyncio.sleep(0.05)  # the engine is in a step; what is asked for waits for its end
        engine.tick(1)
        await until(lambda: len(engine.under_way) == 4)
        engine.tick(long - short - 1)
        assert (await first).responses[0].tolist() == list(range(long))
        engine.permits.release(100)
        assert (await third).responses.lengths.tolist() == [lengths[2]] * 2

    asyncio.run(run())
    assert engine.threads == {"engine"}, "nobody else touches it"


def test_weights_change_in_flight_and_every_token_keeps_its_version() -> None:
    generator, engine = streaming(version=4)
    prompts = prompts_of("abcdef")
    (length,) = prompts.token_ids.lengths.tolist()

    async def run() -> Ragged:
        answers = asyncio.create_task(generator.generate(prompts, SAMPLING, 0))
        await until(lambda: len(engine.under_way) == 2)
        engine.tick(2)
        update = asyncio.create_task(generator.start_weight_update())
        await asyncio.sleep(0.05)
        engine.tick(1)  # the step that was begun
        await update
        engine.permits.release(1)
        await asyncio.sleep(0.05)
        assert engine.num_steps == 3, "between start and finish the engine stands still"
        await generator.update_weights({})
        await generator.finish_weight_update("5")
        engine.permits.release(100)
        return (await answers).versions

    versions = asyncio.run(run())
    assert [row.tolist() for row in versions] == [[4] * 3 + [5] * (length - 3)] * 2


def test_log_probs_are_of_the_weights_that_are_there_while_others_are_answered() -> None:
    generator, engine = streaming(version=2)

    async def run() -> Ragged:
        answers = asyncio.create_task(generator.generate(prompts_of("abcdef"), SAMPLING, 0))
        await until(lambda: len(engine.under_way) == 2)
        engine.permits.release(100)
        found = await generator.token_logprobs(Ragged.from_rows([[1, 2, 3], [4, 5]], np.int32))
        await answers
        return found

    assert [row.tolist() for row in asyncio.run(run())] == [[2.0, 2.0], [2.0]]


def test_what_is_given_up_ends_without_answers_and_leaves_the_others_alone() -> None:
    generator, engine = streaming()
    prompts = prompts_of("abc", "abcdef")

    async def run() -> None:
        calls = [
            asyncio.create_task(generator.generate(prompts.select([row]), SAMPLING, 0, ticket))
            for row, ticket in ((0, 7), (1, 8))
        ]
        await until(lambda: len(engine.under_way) == 4)
        engine.tick(2)
        giving_up = asyncio.create_task(generator.abort([8, 99]))
        await asyncio.sleep(0.05)
        engine.tick(1)
        await giving_up
        assert await calls[1] is None
        engine.permits.release(100)
        assert (await calls[0]).responses.lengths.tolist() == [len(prompts.token_ids[0])] * 2

    asyncio.run(run())


def test_nothing_is_sampled_before_weights_were_published() -> None:
    generator, engine = streaming(version=-1)
    engine.permits.release(100)

    async def run() -> None:
        with pytest.raises(WeightSyncError, match="before the trainer published"):
            await generator.generate(prompts_of("a"), SAMPLING, 0)
        await generator.start_weight_update()
        await generator.finish_weight_update("0")
        rollouts = await generator.generate(prompts_of("a"), SAMPLING, 0)
        assert set(rollouts.versions.values.tolist()) == {0}

    asyncio.run(run())


def test_mistakes_are_those_of_the_call_that_made_them() -> None:
    generator, engine = streaming()
    engine.permits.release(1000)

    async def run() -> None:
        with pytest.raises(GenerationError, match="do not fit into the engine's 1000"):
            await generator.generate(prompts_of("a"), SamplingSpec(1000), 0)
        with pytest.raises(WeightSyncError, match=r"nobody at 10\.0\.0\.1"):
            await generator.init_weight_transfer_engine({"master_address": "10.0.0.1"})
        assert len(await generator.generate(prompts_of("a"), SAMPLING, 0)) == 2, "it lives on"

    asyncio.run(run())


def test_a_step_that_fails_fails_what_is_under_way_and_what_comes_later() -> None:
    loop: SteppingLoop[Ask, Sample | Array] = SteppingLoop(lambda: CountingEngine(version=0))
    CountingEngine.instances[-1].permits.release(100)
    first, second = loop.submit([Ask((1,) * 13)]), loop.submit([Ask((1,) * 13)])
    for future in (first, second, loop.submit([Ask((1, 2))])):
        with pytest.raises(RuntimeError, match="out of luck"):
            future.result(5)


def test_an_engine_that_cannot_be_made_says_why() -> None:
    def build() -> CountingEngine:
        raise WeightSyncError("no engine today")

    with pytest.raises(WeightSyncError, match="no engine today"):
        SteppingLoop(build)
