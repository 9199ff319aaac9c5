"""A role's actors as one: fan out, gather, fail fast, and never wait without a deadline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from rlhf_ray.errors import RlhfRayError, WorkerError
from rlhf_ray.roles import Done
from rlhf_ray.types import Metrics

T = TypeVar("T")


@dataclass(frozen=True)
class Remote(Generic[T]):
    """A `Pending` whose value is made by an actor.

    Fields:
        ref: of the value. watch: of every call that has to succeed before the value counts (all ranks of a group).
        what: the call, for messages. timeout: seconds.
    """

    ref: ray.ObjectRef
    watch: tuple[ray.ObjectRef, ...]
    what: tuple[str, ...]
    timeout: float

    def result(self) -> T:
        wait_all(self.watch, self.what, self.timeout)
        return unwrapped(self.ref, self.what[0])  # type: ignore[no-any-return]


def wait_all(refs: Sequence[ray.ObjectRef], what: Sequence[str], timeout: float) -> None:
    """Wait for all; the first failure is raised at once, whatever the others do (they may wait for the failed one).

    Raises:
        WorkerError: an actor died, or some did not answer in time; names which.
        RlhfRayError: what the worker itself raised.
    """
    names = dict(zip(refs, what, strict=True))
    waiting = list(refs)
    deadline = time.monotonic() + timeout
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = ", ".join(names[ref] for ref in waiting)
            raise WorkerError(f"no answer within {timeout:.0f} s from: {missing}")
        for ref in ready:
            unwrapped(ref, names[ref])


def unwrapped(ref: ray.ObjectRef, what: str) -> object:
    """The value of a finished call, or the error in this project's own types."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RlhfRayError):
            raise cause from None
        raise WorkerError(f"{what} failed: {type(cause).__name__}: {cause}\n{error}") from None
    except RayActorError as error:
        raise WorkerError(f"{what} failed: its process died ({_first_sentence(error)})") from None
    except RayError as error:
        raise WorkerError(f"{what} failed: {_first_sentence(error)}") from None


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@dataclass(frozen=True)
class Timeline:
    """When each call ran, by the clocks of the machines that ran it."""

    calls: list[tuple[str, ray.ObjectRef]] = field(default_factory=list)

    def take(self) -> Metrics:
        """Seconds of each kind of call since the last time, `time/<kind>`; and `time/busy`, of their union.

        Waits for calls that are under way.
        """
        spans = [(kind, *ray.get(ref)) for kind, ref in self.calls]
        self.calls.clear()
        seconds: Metrics = {}
        for kind in dict.fromkeys(kind for kind, _, _ in spans):
            seconds[f"time/{kind}"] = union_seconds([(a, b) for k, a, b in spans if k == kind])
        return seconds | ({"time/busy": union_seconds([(a, b) for _, a, b in spans])} if spans else {})


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

    More threads than cores is ruinous, and one role with all cores is as fast as several with a share each. Where
    every role has its own devices, `enabled` is False and calls run as soon as their inputs are there.
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

    def __len__(self) -> int:
        return len(self.handles)

    def build(self, factory: str, kwargs: Sequence[dict[str, object]], timeout: float) -> None:
        """Build the worker in every actor, at the same time (ranks rendezvous). kwargs: by rank."""
        refs = [handle.build.remote(factory, k) for handle, k in zip(self.handles, kwargs, strict=True)]
        wait_all(refs, [f"{self._rank_name(rank)}.build" for rank in range(len(self))], timeout)

    def call(self, method: str, *args: object, kind: str | None = None) -> Remote[object]:
        """Call a method on all ranks; the value is rank 0's, and counts only if every rank succeeds.

        A `Pending` among the arguments is handed over as a reference: its value goes from actor to actor.

        Args:
            kind: what the time is booked under (`time/<kind>`); None books none.
        """
        results = [self._submit(rank, "call", 2, method, args) for rank in range(len(self))]
        self._end_turn([refs[-1] for refs in results], kind)
        what = tuple(f"{self._rank_name(rank)}.{method}" for rank in range(len(self)))
        return Remote(results[0][0], tuple(refs[0] for refs in results), what, self.timeout)

    def call_pair(self, method: str, *args: object, kind: str | None = None) -> tuple[Remote[object], Remote[object]]:
        """Call a method that returns two values on a group of one."""
        first, second, done = self._submit(0, "call_pair", 3, method, args)
        self._end_turn([done], kind)
        what = (f"{self._rank_name(0)}.{method}",)
        return Remote(first, (first,), what, self.timeout), Remote(second, (second,), what, self.timeout)

    def call_each(
        self, method: str, args_by_rank: Sequence[Sequence[object]], kind: str | None = None
    ) -> list[Remote[object]]:
        """Call a method on every actor with its own arguments, all in the same turn."""
        results = [self._submit(rank, "call", 2, method, args) for rank, args in enumerate(args_by_rank)]
        self._end_turn([refs[-1] for refs in results], kind)
        return [
            Remote(refs[0], (refs[0],), (f"{self._rank_name(rank)}.{method}",), self.timeout)
            for rank, refs in enumerate(results)
        ]

    def _submit(
        self, rank: int, entry: str, num_returns: int, method: str, args: Sequence[object]
    ) -> list[ray.ObjectRef]:
        after = self.turns.last if self.turns.enabled else ()
        remote = getattr(self.handles[rank], entry).options(num_returns=num_returns)
        return remote.remote(method, len(after), *after, *map(_unwrap_argument, args))  # type: ignore[no-any-return]

    def _end_turn(self, done: Sequence[ray.ObjectRef], kind: str | None) -> None:
        self.turns.last = tuple(done)
        if kind is not None:
            self.timeline.calls.extend((kind, ref) for ref in done)

    def _rank_name(self, rank: int) -> str:
        return self.name if len(self) == 1 else f"{self.name}[{rank}]"

    def address(self) -> str:
        """host:port, free now, on the machine of rank 0."""
        return self._ask(0, "address")[0]

    def gpus(self) -> list[str]:
        """The GPUs of all actors, by names that are unique in the cluster."""
        return [gpu for rank in range(len(self)) for gpu in self._ask(rank, "gpus")]

    def _ask(self, rank: int, method: str) -> list[str]:
        ref = getattr(self.handles[rank], method).remote()
        wait_all([ref], [f"{self._rank_name(rank)}.{method}"], self.timeout)
        return ray.get(ref)  # type: ignore[no-any-return]

    def close(self, timeout: float = 20.0) -> None:
        """Let the workers leave their process groups, then end the actors; one that does not answer is killed."""
        closing = [handle.close.remote() for handle in self.handles]
        ray.wait(closing, num_returns=len(closing), timeout=timeout)
        for handle in self.handles:
            ray.kill(handle)


def _unwrap_argument(argument: object) -> object:
    if isinstance(argument, Remote):
        return argument.ref
    if isinstance(argument, Done):
        return argument.value
    return argument


