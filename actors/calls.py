"""Calls to actors that are under way: never waited for without a deadline, the right one is blamed, and what
was lost with an actor that can be started again is asked again.

A call whose argument failed never runs. So when an actor dies, what is lost is known without asking: all that
it was asked and had not answered, and all that needs those answers, however far down. These calls are made
anew, in their order, under the same handles, and whoever waits for them goes on waiting.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import ray
from ray.exceptions import RayActorError, RayError

from actors.failures import dead_actor, failure_of
from actors.pulse import PERIOD, Pulse
from rlhf_ray.errors import RlhfRayError, WeightSyncError, WorkerError, WorkerLost

T = TypeVar("T")
Span = tuple[float, float]

DEATH_NOTICE, MACHINE_NOTICE = 5.0, 45.0
"""Seconds within which Ray notices that a process died, and that a machine did. Peers in a collective fail at
once."""


@dataclass
class Turns:
    """Makes roles that share the same cores take turns: each call starts when the call before it has ended.

    More threads than cores is ruinous, and one role with all cores is as fast as several with a share each.
    Where every role has its own devices, `enabled` is False and calls run as soon as their inputs are there.
    """

    enabled: bool
    last: tuple[Task, ...] = field(default=())


class Role(Protocol):
    """Whose actors were asked."""

    turns: Turns

    def label(self, rank: int) -> str: ...

    def send(self, tasks: Sequence[Task]) -> None:
        """Ask now, in one turn. What its actor, or what it needs, is not ready for stays unsent."""
        ...

    def answered(self, task: Task) -> None: ...

    def listen(self, rank: int) -> WorkerLost | None:
        """The actor's death, if it is so silent that it must be dead."""
        ...

    def start_again(self, rank: int, failure: RlhfRayError) -> None:
        """Raises: the failure, if the actor cannot be replaced."""
        ...

    def put_in_service(self) -> None:
        """Do what unsent tasks wait for."""
        ...


@dataclass(eq=False)
class Task:
    """What one actor is asked.

    Fields:
        rank: of the actor that it is meant for. at: of the one that has it.
        entry: method of the host. method: of the worker; None where the host itself is asked.
        kind: what its time is booked under. turn: tasks of one turn run beside each other.
        is_wanted: False where nobody waits for the answer any more.
        refs: of what it returns, the last when it is done; none while it is not sent.
        needs: the tasks that have to succeed before it runs.
    """

    role: Role
    rank: int
    entry: str
    num_returns: int
    method: str | None
    args: tuple[object, ...]
    kind: str | None = None
    turn: int = 0
    is_wanted: bool = True
    at: int = 0
    actor_id: str = ""
    refs: tuple[ray.ObjectRef, ...] = ()
    needs: tuple[Task, ...] = ()

    @property
    def name(self) -> str:
        """Role, rank and method, for messages."""
        return f"{self.role.label(self.at)}.{self.method or self.entry}"

    @property
    def done(self) -> ray.ObjectRef:
        """Something small: all that a call returns arrives, or fails, together."""
        return self.refs[-1]

    @property
    def is_sent(self) -> bool:
        return bool(self.refs)

    def takes_turn_of(self, turns: Turns) -> bool:
        """Whether the next turn has to wait for it."""
        return turns.enabled and self.is_sent and self.method is not None and self.role.turns is turns


class OpenCalls:
    """Tasks whose end nobody has seen yet, in the order in which they were made.

    Whoever waits for one of them watches all: it may wait for the others, as its arguments or because the
    roles take turns, and when one of them fails, that is the reason, and it is known at once.
    """

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._open: dict[Task, None] = {}
        self._spans: list[tuple[int, str, Span]] = []
        self._turns = itertools.count()

    def next_turn(self) -> int:
        return next(self._turns)

    def is_open(self, task: Task) -> bool:
        return task in self._open

    def add(self, tasks: Sequence[Task]) -> None:
        self._open |= dict.fromkeys(tasks)

    def wait(self, mine: Sequence[Task], timeout: float) -> None:
        """Wait for some of the tasks.

        Args:
            timeout: seconds for all of them together; they begin anew when something had to be asked again.

        Raises:
            WorkerLost: an actor died that cannot be replaced, or one of `mine` did not end in time.
            WorkerError: a call failed; names which.
            RlhfRayError: what a worker raised, as it is.
        """
        self._wait_while(lambda: any(task in self._open for task in mine), mine, timeout)

    def wait_for_sent(self, mine: Sequence[Task], timeout: float) -> None:
        """Wait for those of the tasks that their actors are at, and not for what those wait for.

        Raises: as `wait`.
        """
        self._wait_while(lambda: any(t in self._open and t.is_sent for t in mine), (), timeout)

    def wait_for_first(self, mine: Sequence[Task], count: int, timeout: float) -> list[int]:
        """Wait until `count` of the tasks have ended; which, the first in order if more have.

        Raises: as `wait`.
        """

        def ended() -> list[int]:
            return [index for index, task in enumerate(mine) if task not in self._open]

        self.settle_ended()
        self._wait_while(lambda: len(ended()) < count, mine, timeout)
        return ended()[:count]

    def settle_ended(self) -> None:
        """Look at all that has ended by now. Raises: as `wait`."""
        sent = self._sent()
        refs = list(sent)
        ended, _ = ray.wait(refs, num_returns=len(refs), timeout=0) if refs else ([], [])
        for ref in ended:
            # One that was asked again, because of another that ended, has other references.
            if sent[ref].is_sent and sent[ref].done == ref:
                self._settle(sent[ref])

    def take_spans(self) -> list[tuple[str, Span]]:
        """(kind, when it ran) of what has succeeded since the last time, in the order of the calls."""
        spans, self._spans = sorted(self._spans), []
        return [(kind, span) for _, kind, span in spans]

    def start_again(self, role: Role, rank: int, failure: RlhfRayError) -> None:
        """Replace an actor, and ask what was lost with it again.

        Raises:
            RlhfRayError: the failure, if it cannot be replaced.
        """
        lost = self._lost_with(role, rank)
        role.start_again(rank, failure)
        for task in lost:
            task.refs = ()
            if not task.is_wanted:
                del self._open[task]
        for turns in {id(task.role.turns): task.role.turns for task in lost}.values():
            turns.last = tuple(task for task in self._open if task.takes_turn_of(turns))
        self.send_waiting()

    def send_waiting(self) -> None:
        """Send what can be sent by now, turn by turn."""
        unsent = [task for task in self._open if not task.is_sent]
        for _, turn in itertools.groupby(unsent, key=lambda task: task.turn):
            tasks = list(turn)
            tasks[0].role.send(tasks)

    def _wait_while(self, is_missing: Callable[[], bool], mine: Sequence[Task], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while is_missing():
            self._hasten(mine)
            sent = self._sent()
            left = deadline - time.monotonic()
            # The first in the order of the list: what failed stands before what failed because of it.
            ready, _ = ray.wait(list(sent), num_returns=1, timeout=min(PERIOD, max(0.0, left)))
            if self._listen() or (ready and self._settle(sent[ready[0]])):
                deadline = time.monotonic() + timeout
            elif not ready and left <= 0:
                self._overdue(mine, timeout)
                deadline = time.monotonic() + timeout

    def _overdue(self, mine: Sequence[Task], timeout: float) -> None:
        unanswered = self._unanswered(mine or tuple(self._open))
        names = ", ".join(task.name for task in unanswered)
        first, failure = unanswered[0], WorkerLost(f"no answer within {timeout:g} s from {names}")
        self.start_again(first.role, first.at, failure)

    def _listen(self) -> bool:
        """Whether an actor was found dead by its silence, and replaced."""
        if not self._pulse.is_due:
            return False
        asked = {(id(task.role), task.at): task for task in self._open if task.is_sent}
        for task in asked.values():
            if (failure := task.role.listen(task.at)) is not None:
                self.start_again(task.role, task.at, failure)
                return True
        return False

    def _sent(self) -> dict[ray.ObjectRef, Task]:
        return {task.done: task for task in self._open if task.is_sent}

    def _hasten(self, mine: Sequence[Task]) -> None:
        """Where one of `mine` is not sent, do what it waits for: first of all, the first of those unsent."""
        if any(task in self._open and not task.is_sent for task in mine):
            first = next(task for task in self._open if not task.is_sent)
            first.role.put_in_service()
            self.send_waiting()
            assert first.is_sent, f"{first.name} waits for nothing"

    def _settle(self, task: Task) -> bool:
        """Look at a task that has ended. Returns whether it was lost and is asked again."""
        try:
            span = ray.get(task.done)
        except RayError as error:
            self._handle(task, error)
            return True
        del self._open[task]
        if task.kind is not None:
            self._spans.append((task.turn, task.kind, span))
        # What it was made of may go.
        task.needs = ()
        if task.method is not None:
            task.args = ()
        task.role.answered(task)
        return False

    def _handle(self, task: Task, error: RayError) -> None:
        failure = failure_of(task.name, error)
        if type(failure) in (WorkerError, WeightSyncError):
            # It may be but the consequence of another's death.
            task, error = self._death() or (task, error)
            failure = failure_of(task.name, error)
        dead = self._asked_of(dead_actor(error)) if isinstance(failure, WorkerLost) else None
        if dead is None:
            self._forget(task)
            raise failure
        try:
            self.start_again(dead.role, dead.at, failure_of(dead.name, error))
        except RlhfRayError:
            self._forget(dead)
            raise

    def _forget(self, task: Task) -> None:
        """It has failed for good. Where the caller knows what to do, the next turn must not fail of it."""
        self._open.pop(task, None)
        turns = task.role.turns
        turns.last = tuple(each for each in turns.last if each is not task)

    def _asked_of(self, actor_id: str | None) -> Task | None:
        """The first that this actor was asked and has not answered."""
        return next((task for task in self._open if task.is_sent and task.actor_id == actor_id), None)

    def _death(self) -> tuple[Task, RayError] | None:
        """A task that failed with its process."""
        deadline = time.monotonic() + (MACHINE_NOTICE if len(ray.nodes()) > 1 else DEATH_NOTICE)
        sent = self._sent()
        waiting = list(sent)
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            try:
                ray.get(ready[0])
            except RayActorError as error:
                return sent[ready[0]], error
            except RayError:
                continue
        return None

    def _lost_with(self, role: Role, rank: int) -> list[Task]:
        """What an actor has not answered, and what needs it; builds are its own affair."""
        lost: dict[Task, None] = {}
        for task in self._open:
            is_its_own = task.is_sent and task.role is role and task.at == rank and task.entry != "build"
            if is_its_own or any(need in lost for need in task.needs):
                lost[task] = None
        return list(lost)

    def not_lost_with(self, role: Role, rank: int) -> list[ray.ObjectRef]:
        """What else is under way and takes turns with the role; it ends by itself."""
        lost = self._lost_with(role, rank)
        return [task.done for task in self._open if task.takes_turn_of(role.turns) and task not in lost]

    def _unanswered(self, mine: Sequence[Task]) -> list[Task]:
        """Those up to one's own: the others may be waiting for the first."""
        tasks = [task for task in self._open if task.is_sent]
        last = max(index for index, task in enumerate(tasks) if task in mine)
        return tasks[: last + 1]


@dataclass(frozen=True)
class Remote(Generic[T]):
    """A `Pending` whose value is made by an actor.

    Fields:
        tasks: all that have to succeed before the value counts (all ranks of a group); the value is the
            first one's.
        index: among what it returns.
        calls: where those are listed. timeout: seconds.
    """

    tasks: tuple[Task, ...]
    calls: OpenCalls
    timeout: float
    index: int = 0

    @property
    def value(self) -> ray.ObjectRef:
        return self.tasks[0].refs[self.index]

    def wait(self) -> None:
        """Raises: as `OpenCalls.wait`."""
        self.calls.wait(self.tasks, self.timeout)

    def result(self) -> T:
        self.wait()
        try:
            return ray.get(self.value)
        except RayError as error:
            # It was there, and is not any more: its machine is gone.
            raise failure_of(self.tasks[0].name, error) from error
