"""Calls to actors that are under way: never waited for without a deadline, and the right one is blamed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from rlhf_ray.errors import RlhfRayError, WorkerError

T = TypeVar("T")

DEATH_NOTICE = 5.0
"""Seconds within which Ray notices that a process died. Its peers in a collective fail at once."""


class OpenCalls:
    """Calls whose end nobody has seen yet, in the order in which they were made.

    Whoever waits for one of them watches all: it may wait for the others, as its arguments or because the
    roles take turns, and when one of them fails, that is the reason, and it is known at once.
    """

    def __init__(self) -> None:
        self._names: dict[ray.ObjectRef, str] = {}

    def add(self, name: str, done: ray.ObjectRef) -> None:
        """
        Args:
            name: role, rank and method, for messages.
            done: something small that the call returns. All that a call returns arrives, or fails, together.
        """
        self._names[done] = name

    def wait(self, mine: Sequence[ray.ObjectRef], timeout: float) -> None:
        """Wait for some of the calls.

        Args:
            timeout: seconds for all of them together.

        Raises:
            WorkerError: a call failed, its process died, or one of `mine` did not end in time; names which.
            RlhfRayError: what a worker raised, as it is.
        """
        deadline = time.monotonic() + timeout
        while any(ref in self._names for ref in mine):
            # The first in the order of the list: what failed stands before what failed because of it.
            ready, _ = ray.wait(
                list(self._names), num_returns=1, timeout=max(0.0, deadline - time.monotonic())
            )
            if not ready:
                raise WorkerError(f"no answer within {timeout:g} s from {self._unanswered(mine)}")
            self._settle(ready[0])

    def wait_for_first(self, mine: Sequence[ray.ObjectRef], count: int, timeout: float) -> list[int]:
        """Wait until `count` of the calls have ended; which, the first in order if more have.

        Raises: as `wait`.
        """
        deadline = time.monotonic() + timeout
        while True:
            waiting = list(self._names)
            ended, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0) if waiting else ([], [])
            for ref in ended:
                self._settle(ref)
            done = [index for index, ref in enumerate(mine) if ref not in self._names]
            if len(done) >= count:
                return done[:count]
            left = max(0.0, deadline - time.monotonic())
            if not ray.wait(list(self._names), num_returns=1, timeout=left)[0]:
                raise WorkerError(f"no answer within {timeout:g} s from {self._unanswered(mine)}")

    def _settle(self, ref: ray.ObjectRef) -> None:
        failure = _failure(ref, self._names.pop(ref))
        if failure is None:
            return
        if isinstance(failure, WorkerError) and not isinstance(failure.__cause__, RayActorError):
            raise self._death() or failure
        raise failure

    def _death(self) -> RlhfRayError | None:
        """The death of another process, of which a failure that nobody foresaw may be but the consequence."""
        deadline = time.monotonic() + DEATH_NOTICE
        waiting = list(self._names)
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            failure = _failure(ready[0], self._names[ready[0]]) if ready else None
            if not ready or (failure is not None and isinstance(failure.__cause__, RayActorError)):
                return failure
        return None

    def _unanswered(self, mine: Sequence[ray.ObjectRef]) -> str:
        """Those up to one's own: the others may be waiting for the first."""
        refs = list(self._names)
        last = max(index for index, ref in enumerate(refs) if ref in mine)
        return ", ".join(self._names[ref] for ref in refs[: last + 1])


def _failure(ref: ray.ObjectRef, name: str) -> RlhfRayError | None:
    """How a call that has ended failed, if it did: in this project's types, Ray's account being the cause."""
    try:
        ray.get(ref)
        return None
    except RayTaskError as error:
        if isinstance(error.cause, RlhfRayError):
            failure = error.cause
        else:
            failure = WorkerError(f"{name} failed: {type(error.cause).__name__}: {error.cause}")
        failure.__cause__ = error
    except RayActorError as error:
        failure = WorkerError(f"{name} failed: its process died; its log, and the kernel's, may say why")
        failure.__cause__ = error
    except RayError as error:
        failure = WorkerError(f"{name} failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
    return failure


@dataclass(frozen=True)
class Remote(Generic[T]):
    """A `Pending` whose value is made by an actor.

    Fields:
        value: what is wanted.
        done: of every call that has to succeed before the value counts (all ranks of a group).
        calls: where those are listed. timeout: seconds.
    """

    value: ray.ObjectRef
    done: tuple[ray.ObjectRef, ...]
    calls: OpenCalls
    timeout: float

    def wait(self) -> None:
        """Raises: as `OpenCalls.wait`."""
        self.calls.wait(self.done, self.timeout)

    def result(self) -> T:
        self.wait()
        return ray.get(self.value)
