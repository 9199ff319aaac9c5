"""A role's actors as one: fan out, gather, fail fast, start again, and never wait without a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import ray
from ray.actor import ActorHandle

from actors.calls import OpenCalls, Remote, Task, Turns
from actors.pulse import Pulse
from rlhf_ray.errors import RlhfRayError, WorkerLost
from rlhf_ray.health import Event, Health, State
from rlhf_ray.roles import Done
from rlhf_ray.types import Metrics

GENERATE = "generate"
"""The kind of call in which engines answer prompts."""


class Losses(Protocol):
    """Is told of every actor that is lost, and of its return."""

    def lost(self, name: str, failure: RlhfRayError) -> None:
        """Raises: the failure, if it is one too many."""
        ...

    def returned(self, name: str) -> None: ...


class Unbearable:
    """No loss is made up for."""

    def lost(self, name: str, failure: RlhfRayError) -> None:
        raise failure

    def returned(self, name: str) -> None:
        pass


@dataclass
class Timeline:
    """All calls of a stage: which are open, and when those that ended ran, by the clocks of their machines.

    Fields:
        losses, pulse: of the stage's actors. since: when the time was taken last.
    """

    losses: Losses = field(default_factory=Unbearable)
    pulse: Pulse = field(default_factory=Pulse)
    since: float = 0.0

    def __post_init__(self) -> None:
        self.open = OpenCalls(self.pulse)

    def take(self) -> Metrics:
        """Seconds of each kind of call that ended since the last time, `time/<kind>`.

        Of the time since then, `time/busy` is that in which there were calls, and `time/wait` that in which
        engines generated and nothing else ran. Calls that are under way are counted the next time.
        """
        self.open.settle_ended()
        spans = [(kind, start, end) for kind, (start, end) in self.open.take_spans()]
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


class ActorGroup:
    """All actors of one role.

    An actor of a role whose calls are functions of their arguments alone (`build`, `is_pure`) is replaced
    when it dies. Its calls go to another of the role, or wait for the new one.

    Args:
        name: the role. handles: by rank.
        start: starts the actor of a rank anew; None where it cannot be.
        lost_machine: of those on which the role has its place, if one is gone.
    """

    def __init__(
        self,
        name: str,
        handles: Sequence[ActorHandle],
        turns: Turns,
        timeline: Timeline,
        timeout: float,
        start: Callable[[int], ActorHandle] | None = None,
        lost_machine: Callable[[], WorkerLost | None] = lambda: None,
    ) -> None:
        self.name = name
        self.handles = list(handles)
        self.turns = turns
        self.timeline = timeline
        self.timeout = timeout
        self.num_starts = [1] * len(self.handles)
        self.refresh: Callable[[], None] | None = None
        """Publishes the current weights to all."""
        self._start = start
        self._lost_machine = lost_machine
        self._is_pure = False
        self._health = [Health()] * len(self.handles)
        self._next = -1
        self._builds: tuple[Task, ...] = ()
        self._build_timeout = timeout

    def __len__(self) -> int:
        return len(self.handles)

    def label(self, rank: int) -> str:
        return self.name if len(self) == 1 else f"{self.name}[{rank}]"

    # Building

    def build(
        self,
        factory: str,
        kwargs: Sequence[dict[str, object]],
        timeout: float,
        *,
        is_pure: bool = False,
        needs_weights: bool = False,
    ) -> None:
        """Start to build all workers at the same time, since ranks rendezvous; later calls queue up, but for
        those of hosts whose calls run beside each other.

        Args:
            kwargs: of the worker, by rank.
            timeout: seconds that `wait_until_built` waits.
            is_pure: whether a worker that is built again answers as the first did.
            needs_weights: whether it does so only when a trainer has published to it.
        """
        self._is_pure = is_pure
        self._health = [Health(needs_weights)] * len(self)
        self._build_timeout = timeout
        self._builds = tuple(
            Task(self, rank, "build", 1, None, (factory, own))
            for rank, own in zip(range(len(self)), kwargs, strict=True)
        )
        self._begin(self._builds)

    def wait_until_built(self) -> None:
        """Raises: what a worker's constructor raised; `WorkerLost` after the deadline."""
        assert self._builds, "build first"
        self.timeline.open.wait(self._builds, self._build_timeout)

    # Calls

    def call(self, method: str, *args: object, kind: str | None = None) -> Remote[object]:
        """Call a method on all ranks; the value is rank 0's, and counts only if every rank succeeds.

        A `Pending` among the arguments is handed over as a reference: its value goes from actor to actor.

        Args:
            kind: what the time is booked under (`time/<kind>`); None books none.
        """
        return self._remote(self._called(method, [args] * len(self), kind))

    def call_pair(
        self, method: str, *args: object, kind: str | None = None
    ) -> tuple[Remote[object], Remote[object]]:
        """Call a method that returns two values on a group of one."""
        tasks = self._begin([Task(self, 0, "call_pair", 3, method, args, kind)])
        return self._remote(tasks), self._remote(tasks, index=1)

    def call_each(
        self, method: str, args_by_rank: Sequence[Sequence[object]], kind: str | None = None
    ) -> list[Remote[object]]:
        """Call a method on every actor with its own arguments, all in the same turn."""
        return [self._remote((task,)) for task in self._called(method, args_by_rank, kind)]

    def call_rank(self, rank: int, method: str, *args: object, kind: str | None = None) -> Remote[object]:
        """Call a method on one actor alone."""
        return self._remote(self._begin([Task(self, rank, "call", 2, method, args, kind)]))

    def call_next(self, method: str, *args: object, kind: str | None = None) -> Remote[object]:
        """Call a method on one actor alone, another each time."""
        self._next = (self._next + 1) % len(self)
        return self.call_rank(self._next, method, *args, kind=kind)

    def _called(
        self, method: str, args_by_rank: Sequence[Sequence[object]], kind: str | None
    ) -> Sequence[Task]:
        return self._begin(
            [Task(self, rank, "call", 2, method, tuple(a), kind) for rank, a in enumerate(args_by_rank)]
        )

    def _begin(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Ask, and list the tasks as open."""
        turn = self.timeline.open.next_turn()
        for task in tasks:
            task.turn, task.at = turn, task.rank
        self.send(tasks)
        self.timeline.open.add(tasks)
        return tasks

    def send(self, tasks: Sequence[Task]) -> None:
        """Ask now, in one turn. What its actor, or what it needs, is not ready for stays unsent."""
        takes_turn = self.turns.enabled and all(task.method for task in tasks)
        after = self.turns.last if takes_turn else ()
        sent = [task for task in tasks if self._send(task, after)]
        if takes_turn and sent:
            self.turns.last = tuple(sent)

    def _send(self, task: Task, after: tuple[Task, ...]) -> bool:
        needs = tuple(task for arg in task.args if isinstance(arg, Remote) for task in arg.tasks)
        rank = self._server(task)
        task.needs = (*after, *needs)
        if rank is None or not all(need.is_sent for need in needs):
            return False
        handle, args = self.handles[rank], [_unwrap_argument(arg) for arg in task.args]
        if task.method is not None:
            args = [task.method, len(after), *(each.done for each in after), *args]
        task.at, task.actor_id = rank, handle._actor_id.hex()
        entry = getattr(handle, task.entry).options(num_returns=task.num_returns, name=task.name)
        found = entry.remote(*args)
        task.refs = tuple(found) if task.num_returns > 1 else (found,)
        return True

    def _remote(self, tasks: Sequence[Task], index: int = 0) -> Remote[object]:
        return Remote(tuple(tasks), self.timeline.open, self.timeout, index)

    def _ask(self, entry: str, ranks: Sequence[int]) -> list[object]:
        """What the hosts of these ranks say."""
        tasks = self._begin([Task(self, rank, entry, 1, None, ()) for rank in ranks])
        self.timeline.open.wait(tasks, self.timeout)
        return ray.get([task.done for task in tasks])

    def address(self) -> str:
        """host:port, free now, on the machine of rank 0."""
        return str(self._ask("address", [0])[0])

    def gpus(self) -> list[str]:
        """The GPUs of all actors, by names that are unique in the cluster."""
        found = self._ask("gpus", range(len(self)))
        return [str(gpu) for gpus in found for gpu in cast(list[str], gpus)]

    # Health

    @property
    def in_service(self) -> list[int]:
        """Ranks that may be given work; those under suspicion only where there is no other."""
        usable = [rank for rank, health in enumerate(self._health) if health.is_in_service]
        return [rank for rank in usable if self._health[rank].state is not State.SUSPECT] or usable

    def _server(self, task: Task) -> int | None:
        """The rank that the task is for, or one that stands in for it; None where it has to wait."""
        ranks = self.in_service if self._is_pure and task.method is not None else [task.rank]
        if task.rank in ranks or not ranks:
            return task.rank if ranks else None
        return ranks[task.turn % len(ranks)]

    def answered(self, task: Task) -> None:
        if task.entry == "build":
            self._note(task.rank, Event.BUILT)

    def note_weights(self, receivers: Sequence[ActorHandle]) -> None:
        """These actors have received the current weights."""
        for rank, handle in enumerate(self.handles):
            if handle in receivers:
                self._note(rank, Event.WEIGHTS)
        self.timeline.open.send_waiting()

    def _note(self, rank: int, event: Event) -> None:
        before = self._health[rank]
        self._health[rank] = before.after(event)
        is_back = self._health[rank].state is State.HEALTHY and before.state in (State.STARTING, State.STALE)
        if is_back and self.num_starts[rank] > 1:
            self.timeline.losses.returned(self.label(rank))

    def listen(self, rank: int) -> WorkerLost | None:
        """To the actor's signs of life. Returns its death, if it has been silent for too long."""
        if self._health[rank].state is State.STARTING:
            # It may have no place to start in. Otherwise the deadline for its start is its own.
            return self._lost_machine()
        pulse = self.timeline.pulse
        seconds = pulse.silence(self.handles[rank]._actor_id.hex())
        self._note(rank, Event.SILENCE if seconds > pulse.limit / 2 else Event.SIGN)
        if seconds <= pulse.limit:
            return None
        return WorkerLost(f"{self.label(rank)}: no sign of life for {seconds:.0f} s")

    def start_again(self, rank: int, failure: RlhfRayError) -> None:
        """Replace the actor of a rank; its calls are `OpenCalls.start_again`'s affair.

        Raises:
            RlhfRayError: the failure, if that cannot be done, or has been done too often.
        """
        if self._start is None or not self._is_pure:
            raise failure
        if (gone := self._lost_machine()) is not None:
            raise gone from failure
        self.timeline.losses.lost(self.label(rank), failure)
        ray.kill(self.handles[rank])
        self._health[rank] = self._health[rank].after(Event.DEATH).after(Event.START)
        self.handles[rank] = self._start(rank)
        self.num_starts[rank] += 1
        self.send([self._builds[rank]])
        self.timeline.open.add([self._builds[rank]])

    def put_in_service(self) -> None:
        """Give the engines the weights that their calls wait for."""
        assert self.refresh is not None, f"{self.name} waits for nothing"
        self.refresh()

    # The end

    def begin_close(self) -> list[ray.ObjectRef]:
        """Ask the workers to leave their process groups."""
        return [handle.close.remote() for handle in self.handles]

    def kill(self) -> None:
        """End the actors, whatever they are doing."""
        for handle in self.handles:
            ray.kill(handle)


def _unwrap_argument(argument: object) -> object:
    return argument.value if isinstance(argument, Remote | Done) else argument
