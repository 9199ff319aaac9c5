"""A generation engine in a process of its own, as an actor hosts it: calls go in order."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from rlhf_ray.errors import WorkerError


@dataclass(frozen=True)
class Answer:
    """The answer of one call. A `Pending`."""

    connection: Connection
    timeout: float

    def result(self) -> Any:
        if not self.connection.poll(self.timeout):
            raise WorkerError(f"no answer within {self.timeout:g} s")
        answer = self.connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


class EngineProcess:
    """Any method of the engine by `call`, and the four of the weight sync by name."""

    def __init__(
        self, build: Callable[..., object], *args: object, timeout: float = 120.0, **kwargs: object
    ) -> None:
        self._connection, remote = multiprocessing.Pipe()
        self._timeout = timeout
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=_serve, args=(remote, build, args, kwargs), daemon=True)
        self.process.start()
        remote.close()
        self._built = Answer(self._connection, timeout)

    def wait_until_built(self) -> EngineProcess:
        assert self._built.result() == "built"
        return self

    def call(self, method: str | Callable[..., object], *args: object) -> Answer:
        """A method's name, or a function of a test module that gets the engine as its first argument."""
        self._connection.send((method, args))
        return Answer(self._connection, self._timeout)

    def init_weight_transfer_engine(self, init_info: dict[str, object]) -> Answer:
        return self.call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> Answer:
        return self.call("start_weight_update")

    def update_weights(self, update_info: dict[str, object]) -> Answer:
        return self.call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str) -> Answer:
        return self.call("finish_weight_update", weight_version)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self._connection.close()


def rest_and_wake(engine: EngineProcess) -> None:
    """As a role does that shares its devices: awake from the start, it is woken before every turn."""
    for method in ("wake", "rest", "wake", "wake"):
        engine.call(method).result()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _serve(connection: Connection, build: Callable[..., object], args: tuple, kwargs: dict) -> None:
    engine = build(*args, **kwargs)
    connection.send("built")
    while True:
        method, arguments = connection.recv()
        try:
            if callable(method):
                answer = method(engine, *arguments)
            else:
                answer = getattr(engine, method)(*arguments)
        except Exception as error:
            answer = error
        connection.send(answer)
