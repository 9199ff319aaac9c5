"""An engine that goes on stepping: requests come and go, and weights change between two steps."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

R_contra = TypeVar("R_contra", contravariant=True)
A_co = TypeVar("A_co", covariant=True)
R = TypeVar("R")
A = TypeVar("A")
T = TypeVar("T")


class Steps(Protocol[R_contra, A_co]):
    """An engine with a scheduler of its own, only ever touched by one thread."""

    def add(self, key: str, request: R_contra) -> None: ...

    def step(self) -> Sequence[tuple[str, A_co]]:
        """Go on with all requests by a little; the keys and answers of those that are done."""
        ...

    def abort(self, keys: Sequence[str]) -> None: ...


@dataclass
class _Group(Generic[A]):
    """Requests that are answered together.

    Fields:
        keys: of the requests, in their order. answers: of those that are done, by key.
    """

    ticket: int | None
    keys: list[str]
    answers: dict[str, A]
    future: Future[list[A] | None]


class SteppingLoop(Generic[R, A]):
    """The thread that an engine lives on. What others ask of it is done between two steps, in the order in
    which it was asked; their calls return at once, with a future.

    After a step that failed nothing can be said of any request: all of them fail, and all later ones.
    """

    def __init__(self, build: Callable[[], Steps[R, A]]) -> None:
        """Returns when the engine is made, on its thread."""
        self._jobs: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self._groups: dict[str, _Group[A]] = {}
        self._keys = itertools.count()
        self._is_paused = False
        self._failure: BaseException | None = None
        threading.Thread(target=self._run, name="engine", daemon=True).start()
        self._engine = self.between_steps(build).result()

    def between_steps(self, function: Callable[[], T]) -> Future[T]:
        """Call a function while no step is being made."""
        future: Future[T] = Future()

        def job() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        return future

    def submit(self, requests: Sequence[R], ticket: int | None = None) -> Future[list[A] | None]:
        """Begin to answer. The answers arrive together, in the order of the requests; None if they were given
        up before.

        Args:
            ticket: by which to give them up.
        """
        future: Future[list[A] | None] = Future()

        def add() -> None:
            try:
                if self._failure is not None:
                    raise self._failure
                keys = [str(next(self._keys)) for _ in requests]
                group = _Group(ticket, keys, {}, future)
                for key, request in zip(keys, requests, strict=True):
                    self._engine.add(key, request)
                    self._groups[key] = group
            except BaseException as error:
                future.set_exception(error)

        self.between_steps(add)
        return future

    def abort(self, tickets: Sequence[int]) -> Future[None]:
        """Give up what was begun with these tickets; what is done stays done."""

        def run() -> None:
            late = {key: group for key, group in self._groups.items() if group.ticket in tickets}
            self._engine.abort(list(late))
            for key in late:
                del self._groups[key]
            for future in {group.future for group in late.values()}:
                future.set_result(None)

        return self.between_steps(run)

    def pause(self) -> None:
        """Make no step until `resume`. To be called between two steps."""
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and (self._is_paused or not self._groups):
                    self._changed.wait()
                jobs, self._jobs = self._jobs, []
            for job in jobs:
                job()
            if self._groups and not self._is_paused:
                self._step()

    def _step(self) -> None:
        try:
            done = self._engine.step()
        except BaseException as error:
            self._failure = error
            for future in {group.future for group in self._groups.values()}:
                future.set_exception(error)
            self._groups.clear()
            return
        for key, answer in done:
            group = self._groups.pop(key)
            group.answers[key] = answer
            if len(group.answers) == len(group.keys):
                group.future.set_result([group.answers[own] for own in group.keys])
