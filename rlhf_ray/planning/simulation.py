"""The loop over many devices, by a model of its events: what asynchrony gains, and how stale answers get.

What is in flight, what is taken, and what is given up is decided by `loops.in_flight.InFlight`, the class of
the real loop, fed as `loops.sampling.Sampler` feeds it. Engines are `decoding.Decoding`: answers of drawn,
long-tailed lengths share an engine's steps. Training, and taking new weights, take given times.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from rlhf_ray.loops.in_flight import Begun, InFlight
from rlhf_ray.planning.decoding import Decoding, Speed
from rlhf_ray.planning.lengths import Lengths


@dataclass(frozen=True)
class Fleet:
    """Devices and what they do.

    Fields:
        num_devices: of all. width: of an engine. slots: answers that it makes at a time.
        speed: of an engine. train: devices -> seconds of everything of a step that is not sampling, where its
            answers are as long as the mean.
        sync: seconds in which new weights reach the engines, which stand still.
        prompts: of a step; group: answers to each.
    """

    num_devices: int
    width: int
    slots: int
    speed: Speed
    train: Callable[[int], float]
    sync: float
    prompts: int
    group: int
    lengths: Lengths


@dataclass(frozen=True)
class Schedule:
    """
    Fields:
        max_lag, stragglers, oversample: as in the configuration's `online`.
        generating: devices of the engines; 0 is all, in turn with training.
        updates_a_sync: steps after which new weights, and new prompts, reach the engines.
        capacity: prompts in flight; None is what `Sampler` has.
    """

    name: str
    max_lag: int = 0
    stragglers: Literal["wait", "drop"] = "wait"
    oversample: float = 1.0
    generating: int = 0
    updates_a_sync: int = 1
    capacity: int | None = None


@dataclass(frozen=True)
class Outcome:
    """Fields: step: seconds. busy: share of the devices' time in which they have something to do. full: share
    of it that the same work would take if every engine always had all its slots filled.
    lag_mean, lag_max: versions by which what is trained on is behind. given_up: share of the prompts.
    length: of what is trained on, over the mean of all: what is done first is short."""

    step: float
    busy: float
    full: float
    lag_mean: float
    lag_max: int
    given_up: float
    length: float


@dataclass(eq=False)
class Group:
    """Answers to a prompt. Fields: tokens: of all. left: that are not done. done: when the last was."""

    engine: int
    keys: list[int]
    tokens: float
    left: int
    done: float = math.inf


@dataclass
class Engines:
    """All engines, and what they are at."""

    count: int
    speed: Speed
    slots: int
    engines: list[Decoding] = field(init=False)

    def __post_init__(self) -> None:
        self.engines = [Decoding(self.speed, self.slots) for _ in range(self.count)]
        self._owner: dict[int, Group] = {}
        self._events: list[tuple[float, int, int]] = []
        self._stamps = [0] * self.count
        self._loads = [0] * self.count
        self._next = 0

    def begin(self, lengths: Sequence[float], engine: int, now: float) -> Group:
        keys = list(range(self._next, self._next + len(lengths)))
        self._next += len(lengths)
        group = Group(engine, keys, sum(lengths), len(keys))
        self._owner.update(dict.fromkeys(keys, group))
        self.engines[engine].add(zip(keys, lengths, strict=True), now)
        self._changed(engine)
        return group

    def least_loaded(self) -> int:
        """The first of those that have least to do."""
        return self._loads.index(min(self._loads))

    def wait(self, groups: Sequence[Group], now: float) -> float:
        """Until all are done."""
        self._until(groups, len(groups))
        return max([now, *(group.done for group in groups)])

    def first_done(self, groups: Sequence[Group], count: int) -> list[int]:
        """Which of them are done first."""
        self._until(groups, count)
        order = sorted(range(len(groups)), key=lambda index: groups[index].done)
        return order[:count]

    def _until(self, groups: Sequence[Group], count: int) -> None:
        """So many of them are done."""
        waited_for = {id(group) for group in groups if group.left}
        missing = count - (len(groups) - len(waited_for))
        while missing > 0:
            missing -= id(self._step()) in waited_for

    def go_on(self, now: float) -> None:
        """All that is done until then."""
        while self._events and self._events[0][0] <= now:
            self._step()

    def pause(self, begin: float, seconds: float) -> None:
        self.go_on(begin)
        for index, engine in enumerate(self.engines):
            engine.pause(begin, seconds)
            self._changed(index)

    def give_up(self, groups: Sequence[Group], now: float) -> None:
        for group in groups:
            self.engines[group.engine].remove(set(group.keys), now)
            for key in group.keys:
                self._owner.pop(key, None)
            self._changed(group.engine)

    def _step(self) -> Group | None:
        """The next event; the group that it completes."""
        _, index, stamp = heapq.heappop(self._events)
        if stamp != self._stamps[index]:
            return None
        time, key = self.engines[index].pop()
        group = self._owner.pop(key)
        group.left -= 1
        if group.left == 0:
            group.done = time
        self._changed(index)
        return None if group.left else group

    def _changed(self, index: int) -> None:
        self._stamps[index] += 1
        self._loads[index] = len(self.engines[index])
        next_done = self.engines[index].next_done
        if next_done < math.inf:
            heapq.heappush(self._events, (next_done, index, self._stamps[index]))


def simulate(
    fleet: Fleet, schedule: Schedule, steps: int = 12, seed: int = 0, *, scale_training: bool = True
) -> Outcome:
    """
    Args:
        steps: that count, after as many as it takes until the pipeline is full.
        scale_training: with the tokens of what is trained on; else it takes the same time at every step.
    """
    run = _Run(fleet, schedule, seed, scale_training)
    settle = (schedule.max_lag + 2) * schedule.updates_a_sync
    for step in range(settle):
        run.step(step)
    run.mark()
    for step in range(settle, settle + steps):
        run.step(step)
    return run.outcome(steps)


class _Run:
    def __init__(self, fleet: Fleet, schedule: Schedule, seed: int, scale_training: bool) -> None:
        self.fleet, self.schedule, self.scale_training = fleet, schedule, scale_training
        self.generating = schedule.generating or fleet.num_devices
        self.training = fleet.num_devices - schedule.generating
        self.engines = Engines(max(1, self.generating // fleet.width), fleet.speed, fleet.slots)
        spare = round((schedule.oversample - 1) * fleet.prompts)
        capacity = schedule.capacity or (schedule.max_lag + 1) * fleet.prompts + spare
        self.in_flight: InFlight[Group] = InFlight(capacity, schedule.max_lag)
        self.generator = np.random.default_rng(seed)
        self.now = self.trained = 0.0
        self.row = 0
        self.lags: list[int] = []
        self.given_up = 0
        self.tokens = 0.0

    def step(self, step: int) -> None:
        version = step // self.schedule.updates_a_sync
        if step % self.schedule.updates_a_sync == 0:
            self._keep_in_flight(version)
        taken = self._take(version, (step + 1) // self.schedule.updates_a_sync)
        self.lags += [version - each.version for each in taken]
        self.tokens += (tokens := sum(each.work.tokens for each in taken))
        expected = self.fleet.lengths.mean * self.fleet.group * len(taken)
        longer = tokens / expected if self.scale_training else 1.0
        seconds = self.fleet.train(self.training) * longer
        self.trained += seconds
        self.now += seconds
        if (step + 1) % self.schedule.updates_a_sync == 0:
            self.engines.pause(self.now, self.fleet.sync)
            self.now += self.fleet.sync

    def _keep_in_flight(self, version: int) -> None:
        """As `Sampler.keep_in_flight` does, in a run without an end."""
        self.engines.go_on(self.now)
        while (count := min(self.fleet.prompts, self.in_flight.room)) > 0:
            self.in_flight.add([self._begin(version, index, count) for index in range(count)])

    def _begin(self, version: int, index: int, count: int) -> Begun[Group]:
        engine = index * self.engines.count // count
        if self.schedule.max_lag or self.schedule.stragglers == "drop":
            engine = self.engines.least_loaded()
        lengths = self.fleet.lengths.draw(self.generator, self.fleet.group)
        self.row += 1
        return Begun((self.row,), version, self.engines.begin(lengths.tolist(), engine, self.now))

    def _take(self, version: int, next_version: int) -> list[Begun[Group]]:
        """As `Sampler.take` does."""
        size = self.fleet.prompts
        if self.schedule.stragglers == "wait":
            taken = self.in_flight.take(version, size)
            self.now = self.engines.wait([each.work for each in taken], self.now)
            return taken
        taken = self.in_flight.take(version, size, self.engines.first_done)
        self.now = max([self.now, *(each.work.done for each in taken)])
        late = self.in_flight.give_up(next_version)
        self.engines.give_up([each.work for each in late], self.now)
        self.given_up += len(late)
        return taken

    def mark(self) -> None:
        """What counts begins here."""
        self.began, self.trained = self.now, 0.0
        self.lags, self.given_up, self.tokens = [], 0, 0.0
        self.made = [(engine.busy, engine.tokens) for engine in self.engines.engines]

    def outcome(self, steps: int) -> Outcome:
        fleet, wall = self.fleet, self.now - self.began
        busy = sum(
            engine.busy - was for engine, (was, _) in zip(self.engines.engines, self.made, strict=True)
        )
        tokens = sum(
            engine.tokens - was for engine, (_, was) in zip(self.engines.engines, self.made, strict=True)
        )
        at_full = tokens * fleet.speed.step(fleet.slots) / fleet.slots
        trained = self.trained * self.training
        whole = wall * fleet.num_devices
        return Outcome(
            step=wall / steps,
            busy=(busy * fleet.width + trained) / whole,
            full=(at_full * fleet.width + trained) / whole,
            lag_mean=float(np.mean(self.lags)),
            lag_max=max(self.lags),
            given_up=self.given_up / (self.given_up + len(self.lags)),
            length=self.tokens / (len(self.lags) * fleet.group * fleet.lengths.mean),
        )
