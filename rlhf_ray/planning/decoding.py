"""An engine that decodes: how fast, and when which answer is done."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

Key = int


@dataclass(frozen=True)
class Speed:
    """Seconds of one decoding step, by the number of sequences in it. In the matrices of a layer the weights
    are read once while every token is multiplied with them; in its attention, before or after that, each
    sequence's KV cache is read.

    Fields:
        fixed: of a step, whatever is in it. read, compute: of a sequence.
        prefill: of a sequence, its prompt's share for each token of its answer.
    """

    fixed: float
    weights: float
    read: float
    compute: float
    prefill: float = 0.0

    def step(self, running: int) -> float:
        return self.fixed + max(self.weights, running * self.compute) + running * (self.read + self.prefill)


class Decoding:
    """Sequences on one engine. All that run get a token a step, so one count of steps says when each is done.

    Args:
        slots: sequences that run at a time; the others wait in order.
    """

    def __init__(self, speed: Speed, slots: int) -> None:
        self.speed, self.slots = speed, slots
        self.clock = 0.0
        self.busy = 0.0
        """Seconds in which something ran."""
        self.tokens = 0.0
        """That were made."""
        self._steps = 0.0
        self._running: list[tuple[float, Key]] = []
        self._waiting: deque[tuple[Key, float]] = deque()

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)

    def add(self, sequences: Iterable[tuple[Key, float]], now: float) -> None:
        """Key and tokens of each."""
        self._move(now)
        self._waiting.extend(sequences)
        self._fill()

    @property
    def next_done(self) -> float:
        """When the next answer is done, if nothing is added."""
        if not self._running:
            return math.inf
        return self.clock + (self._running[0][0] - self._steps) * self.speed.step(len(self._running))

    def pop(self) -> tuple[float, Key]:
        """Time and key of the next one that is done."""
        self._move(self.next_done)
        steps, key = heapq.heappop(self._running)
        self._steps = max(self._steps, steps)
        self._fill()
        return self.clock, key

    def pause(self, begin: float, seconds: float) -> None:
        """Nothing is made for a while: weights change."""
        self._move(begin)
        self.clock = max(self.clock, begin) + seconds

    def remove(self, keys: set[Key], now: float) -> None:
        """Give up on some."""
        self._move(now)
        self._running = [entry for entry in self._running if entry[1] not in keys]
        heapq.heapify(self._running)
        self._waiting = deque(entry for entry in self._waiting if entry[0] not in keys)
        self._fill()

    def _move(self, now: float) -> None:
        seconds = now - self.clock
        if seconds <= 0:
            return
        if self._running:
            steps = seconds / self.speed.step(len(self._running))
            self._steps += steps
            self.busy += seconds
            self.tokens += steps * len(self._running)
        self.clock = now

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self.slots:
            key, tokens = self._waiting.popleft()
            heapq.heappush(self._running, (self._steps + tokens, key))


def decode_seconds(lengths: Iterable[float], slots: int, speed: Speed) -> float:
    """Until one engine has made all of them."""
    engine = Decoding(speed, slots)
    engine.add(enumerate(lengths), 0.0)
    while len(engine):
        engine.pop()
    return engine.clock
