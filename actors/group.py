"""A role's actors as one: fan out, gather, fail fast, and never wait without a deadline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import ray
from ray.actor import ActorHandle

from actors.calls import OpenCalls, Remote
from rlhf_ray.roles import Done
from rlhf_ray.types import Metrics

GENERATE = "generate"
"""The kind of call in which engines answer prompts."""


@dataclass
class Timeline:
    """All calls of a stage: which are open, and when those that ended ran, by the clocks of their machines.

    Fields:
        calls: (kind, done) of calls whose time is booked and not yet taken.
        since: when it was taken last.
    """

    calls: list[tuple[str, ray.ObjectRef]] = field(default_factory=list)
    open: OpenCalls = field(default_factory=OpenCalls)
    since: float = 0.0

    def take(self) -> Metrics:
        """Seconds of each kind of call that ended since the last time, `time/<kind>`.

        Of the time since then, `time/busy` is that in which there were calls, and `time/wait` that in which
        engines generated and nothing else ran. Calls that are under way are counted the next time.
        """
        refs = [ref for _, ref in self.calls]
        ended, _ = ray.wait(refs, num_returns=len(refs), timeout=0) if refs else ([], [])
        self.open.wait(ended, timeout=0)
        spans = [(kind, *ray.get(ref)) for kind, ref in self.calls if ref in ended]
        self.calls[:] = [call for call in self.calls if call[1] not in ended]
        seconds: Metrics = {}
        for kind in dict.fromkeys(kind for kind, _, _ in spans):
            seconds[f"time/{kind}"] = union_seconds([(a, b) for k, a, b in spans if k == kind])
        recent = [(kind, max(start, self.since), end) for kind, start, end in spans if end > self.since]
        self.since = time.time()
        if spans:
            seconds["time/busy"] = union_seconds([(a, b) for _, a, b in recent])
        if f"time/{GENERATE}" in seconds:
            others = union_seconds([(a, b) for kind, a, b in recent if kind != GENERATE])
            seconds["time/wait"] = seconds["time/busy"] - others
        return seconds


def union_seconds(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of (start, end)."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


@dataclass
class Turns:
    """Makes roles that share the same cores take turns: each call starts when the call before it has ended.

    More threads than cores is ruinous, and one role with all cores is as fast as several with a share each.
    Where every role has its own devices, `enabled` is False and calls run as soon as their inputs are there.
    """

    enabled: bool
    last: tuple[ray.ObjectRef, ...] = field(default=())


class ActorGroup:
    """All actors of one role.

    Args:
        name: the role. handles: by rank.
    """

    def __init__(
        self, name: str, handles: Sequence[ActorHandle], turns: Turns, timeline: Timeline, timeout: float
    ) -> None:
        self.name = name
        self.handles = list(handles)
        self.turns = turns
        self.timeline = timeline
        self.timeout = timeout
        self._built: Remote[None] | None = None

    def __len__(self) -> int:
        return len(self.handles)

    def build(self, factory: str, kwargs: Sequence[dict[str, object]], timeout: float) -> None:
        """Start to build all workers at the same time, since ranks rendezvous; later calls queue up.

        Args:
            kwargs: of the worker, by rank.
            timeout: seconds that `wait_until_built` waits.
        """
        refs = [handle.build.remote(factory, k) for handle, k in zip(self.handles, kwargs, strict=True)]
        self._opened("build", refs)
        self._built = Remote(refs[0], tuple(refs), self.timeline.open, timeout)

    def wait_until_built(self) -> None:
        """Raises: what a worker's constructor raised; `WorkerError` after the deadline."""
        assert self._built is not None, "build first"
        self._built.result()

    def call(self, method: str, *args: object, kind: str | None = None) -> Remote[object]:
        """Call a method on all ranks; the value is rank 0's, and counts only if every rank succeeds.

        A `Pending` among the arguments is handed over as a reference: its value goes from actor to actor.

        Args:
            kind: what the time is booked under (`time/<kind>`); None books none.
        """
        returns = [self._submit(rank, "call", 2, method, args) for rank in range(len(self))]
        done = self._end_turn(method, returns, kind)
        return self._remote(returns[0][0], done)

    def call_pair(
        self, method: str, *args: object, kind: str | None = None
    ) -> tuple[Remote[object], Remote[object]]:
        """Call a method that returns two values on a group of one."""
        first, second, end = self._submit(0, "call_pair", 3, method, args)
        done = self._end_turn(method, [[end]], kind)
        return self._remote(first, done), self._remote(second, done)

    def call_each(
        self, method: str, args_by_rank: Sequence[Sequence[object]], kind: str | None = None
    ) -> list[Remote[object]]:
        """Call a method on every actor with its own arguments, all in the same turn."""
        returns = [self._submit(rank, "call", 2, method, args) for rank, args in enumerate(args_by_rank)]
        done = self._end_turn(method, returns, kind)
        return [self._remote(refs[0], (end,)) for refs, end in zip(returns, done, strict=True)]

    def call_rank(self, rank: int, method: str, *args: object, kind: str | None = None) -> Remote[object]:
        """Call a method on one actor alone."""
        value, end = self._submit(rank, "call", 2, method, args)
        self._end_turn(method, [[end]], kind, first_rank=rank)
        return self._remote(value, (end,))

    def _submit(
        self, rank: int, entry: str, num_returns: int, method: str, args: Sequence[object]
    ) -> list[ray.ObjectRef]:
        after = self.turns.last if self.turns.enabled else ()
        remote = getattr(self.handles[rank], entry).options(num_returns=num_returns)
        return remote.remote(method, len(after), *after, *map(_unwrap_argument, args))

    def _end_turn(
        self,
        method: str,
        returns: Sequence[Sequence[ray.ObjectRef]],
        kind: str | None,
        first_rank: int = 0,
    ) -> tuple[ray.ObjectRef, ...]:
        """Note the calls of a turn. returns: of each rank's call; the last of them, its span, is returned."""
        done = tuple(refs[-1] for refs in returns)
        self.turns.last = done
        self._opened(method, done, first_rank)
        if kind is not None:
            self.timeline.calls.extend((kind, ref) for ref in done)
        return done

    def _remote(self, value: ray.ObjectRef, done: tuple[ray.ObjectRef, ...]) -> Remote[object]:
        return Remote(value, done, self.timeline.open, self.timeout)

    def _opened(self, method: str, done: Sequence[ray.ObjectRef], first_rank: int = 0) -> None:
        """List calls of consecutive ranks as open."""
        for rank, ref in enumerate(done, start=first_rank):
            name = self.name if len(self) == 1 else f"{self.name}[{rank}]"
            self.timeline.open.add(f"{name}.{method}", ref)

    def _ask(self, method: str, handles: Sequence[ActorHandle]) -> list[object]:
        """What the hosts of the first ranks say."""
        refs = [getattr(handle, method).remote() for handle in handles]
        self._opened(method, refs)
        self.timeline.open.wait(refs, self.timeout)
        return ray.get(refs)

    def address(self) -> str:
        """host:port, free now, on the machine of rank 0."""
        return str(self._ask("address", self.handles[:1])[0])

    def gpus(self) -> list[str]:
        """The GPUs of all actors, by names that are unique in the cluster."""
        return [str(gpu) for gpus in self._ask("gpus", self.handles) for gpu in cast(list[str], gpus)]

    def begin_close(self) -> list[ray.ObjectRef]:
        """Ask the workers to leave their process groups."""
        return [handle.close.remote() for handle in self.handles]

    def kill(self) -> None:
        """End the actors, whatever they are doing."""
        for handle in self.handles:
            ray.kill(handle)


def _unwrap_argument(argument: object) -> object:
    return argument.value if isinstance(argument, Remote | Done) else argument
