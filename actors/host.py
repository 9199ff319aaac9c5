"""The actor that hosts any worker class. Everything that a role does is a method of the worker."""

from __future__ import annotations

import faulthandler
import importlib
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import ray

from actors.pulse import give_signs
from rlhf_ray.errors import WorkerError

RENDEZVOUS_PORTS = range(20_000, 30_000)
Span = tuple[float, float]
"""Start and end, seconds since 1970."""


class Host:
    """One process of a role.

    The worker is built by `build` and not by the constructor, so that a mistake in it is an answer with its
    own type (a `ModelError`, say) and not an actor that died.

    Args:
        name: role and rank, for messages.
        log_path: where this process's chatter goes (the libraries print a lot).
        environment: variables that Ray must not show, which it does with those of a runtime_env.
    """

    def __init__(self, name: str, log_path: str, environment: Mapping[str, str] | None = None) -> None:
        os.environ.update(environment or {})
        self.name = name
        self.worker: object | None = None
        _redirect_output(Path(log_path))
        faulthandler.enable()
        give_signs()

    def build(self, factory: str, kwargs: dict[str, object]) -> None:
        """factory: `module:Class` of the worker."""
        module, _, name = factory.partition(":")
        with _failure_logged():
            self.worker = getattr(importlib.import_module(module), name)(**kwargs)

    def call(self, method: str, num_after: int, *args: object) -> tuple[object, Span]:
        """Run a method of the worker; the first `num_after` arguments only order this call after others.

        The second value says when it ran; later calls can wait on it without a copy of the first.
        """
        start = time.time()
        with _failure_logged():
            function: Callable[..., object] = getattr(self.worker, method)
            value = function(*args[num_after:])
        return value, (start, time.time())

    def call_pair(self, method: str, num_after: int, *args: object) -> tuple[object, object, Span]:
        """As `call`, for a method that returns two values that travel apart."""
        value, span = self.call(method, num_after, *args)
        first, second = cast("tuple[object, object]", value)
        return first, second, span

    def address(self) -> str:
        """host:port, free now, for a rendezvous that this process will host."""
        host = ray.util.get_node_ip_address()
        # Below the range that the system hands out: nobody else is given the port before it is used.
        for port in random.sample(RENDEZVOUS_PORTS, len(RENDEZVOUS_PORTS)):
            with socket.socket() as probe:
                try:
                    probe.bind((host, port))
                except OSError:
                    continue
                return f"{host}:{port}"
        raise WorkerError(f"{self.name}: every port from 20000 to 29999 is in use on {host}")

    def gpus(self) -> list[str]:
        """This actor's GPUs, by node and index."""
        context = ray.get_runtime_context()
        return [f"{context.get_node_id()}/{gpu}" for gpu in context.get_accelerator_ids().get("GPU", [])]

    def close(self) -> None:
        close = getattr(self.worker, "close", None)
        if close is not None:
            close()


class AsyncHost(Host):
    """A process whose calls run beside each other: the worker's methods are coroutines."""

    async def call(self, method: str, num_after: int, *args: object) -> tuple[object, Span]:  # type: ignore[override]
        start = time.time()
        with _failure_logged():
            function: Callable[..., Awaitable[object]] = getattr(self.worker, method)
            value = await function(*args[num_after:])
        return value, (start, time.time())


@contextmanager
def _failure_logged() -> Iterator[None]:
    """The traceback goes to this process's log too: a caller in another actor passes on the message alone."""
    try:
        yield
    except Exception:
        traceback.print_exc()
        raise


def _redirect_output(path: Path) -> None:
    """Send stdout and stderr of this process and its children to a file; where the folder is not there
    (another machine without the shared folder), they stay with Ray's own logs."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except OSError as error:
        print(f"{path}: {error}; output stays in Ray's logs", file=sys.stderr)
        return
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(log, descriptor)
    os.close(log)
