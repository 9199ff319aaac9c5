"""An object in a process of its own, for the arm of a comparison that has to do without Ray.

Nothing heavy is imported here: the process is given its environment (threads, devices) before any library
reads it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rlhf_ray.errors import WorkerError

NICENESS = 15
"""That of Ray's workers: whatever else runs on the machine takes as much time from either arm."""


@dataclass(frozen=True)
class Answer:
    """Of a call that is under way; answers come in the order of the calls."""

    name: str
    connection: Connection
    timeout: float

    def result(self) -> Any:
        """Raises: WorkerError if the call failed, the process ended, or nothing came in time."""
        try:
            if not self.connection.poll(self.timeout):
                raise WorkerError(f"{self.name}: no answer within {self.timeout:g} s")
            failed, value = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise WorkerError(f"{self.name}: its process ended") from error
        if failed:
            raise WorkerError(f"{self.name}: {value}")
        return value


class Peer:
    """Built at once, in the background; `call` returns before the work is done."""

    def __init__(
        self,
        factory: str,
        kwargs: Mapping[str, object],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        timeout: float = 1800.0,
    ) -> None:
        """
        Args:
            factory: `module:Class` of the object. kwargs: of its constructor.
            log: where the process's chatter goes.
            timeout: seconds of every wait.
        """
        self.name = factory.partition(":")[2]
        self._timeout = timeout
        self._connection, remote = multiprocessing.Pipe()
        # Not a daemon: engines have children. It ends when its connection does, however this process ends.
        self._process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(remote, factory, dict(kwargs), str(log))
        )
        with _environment(environment or {}):
            self._process.start()
        remote.close()
        self._built: Answer | None = self._answer("build")

    def wait_until_built(self) -> Peer:
        if self._built is not None:
            self._built.result()
            self._built = None
        return self

    def call(self, method: str, *args: object) -> Answer:
        self.wait_until_built()
        self._connection.send((method, args))
        return self._answer(method)

    def _answer(self, method: str) -> Answer:
        return Answer(f"{self.name}.{method}", self._connection, self._timeout)

    def stop(self) -> None:
        self._connection.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """What a process that is started inside inherits."""
    earlier = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in earlier.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Connection, factory: str, kwargs: dict[str, object], log: str) -> None:
    _redirect(Path(log))
    os.nice(max(0, NICENESS - os.nice(0)))
    module, _, name = factory.partition(":")
    served: object = None
    method, args = "build", ()
    while True:
        try:
            if method == "build":
                served, value = getattr(importlib.import_module(module), name)(**kwargs), None
            else:
                value = getattr(served, method)(*args)
            answer = (False, value)
        except Exception as error:
            traceback.print_exc()
            answer = (True, f"{type(error).__name__}: {error}")
        try:
            connection.send(answer)
            method, args = connection.recv()
        except (EOFError, ConnectionError):
            return


def _redirect(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(log, descriptor)
    os.close(log)
