"""Reward functions in a process of their own, which is killed when they do not answer in time.

Threads cannot be killed, and a regular expression that backtracks for ever does not even let others run.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import cast

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.schema import TextVerifier
from rlhf_ray.errors import ConfigError, RewardError, RlhfRayError
from rlhf_ray.rewards.functions import RewardFunction, TextFunction
from rlhf_ray.rewards.source import Samples, Values

BUILD_TIMEOUT = 120.0
GRACE = 2.0
"""Seconds more than the child's own limit, after which its parent kills it."""


class ChildFunction:
    """
    A function is asked about a whole batch, and a verifier about one answer after the other, so that one
    which it never judges takes no others with it.

    Args:
        function: import path, or the section of a verifier.
        timeout: seconds a batch, or an answer. The first also waits for the process to start, which does not
            count.
    """

    def __init__(self, name: str, function: str | TextVerifier, timeout: float) -> None:
        self.name = name
        self.function = function
        self.timeout = timeout
        self._child: _Child | None = None

    async def score(self, samples: Samples) -> Values:
        is_verifier = not isinstance(self.function, str)
        return await asyncio.to_thread(self._one_by_one if is_verifier else self._together, samples)

    def _together(self, samples: Samples) -> Values:
        (answer,) = self._answers([samples])
        if isinstance(answer, RlhfRayError):
            raise answer
        return Values(answer)

    def _one_by_one(self, samples: Samples) -> Values:
        rewards = np.full(len(samples), np.nan, dtype=np.float32)
        failures = {}
        for row, answer in enumerate(self._answers([samples.select([row]) for row in range(len(samples))])):
            if isinstance(answer, RlhfRayError):
                failures[row] = str(answer).removeprefix(f"reward '{self.name}'").lstrip(": ")
            else:
                rewards[row] = answer[0]
        return Values(rewards, failures=failures)

    def _answers(self, batches: Sequence[Samples]) -> Iterator[NDArray[np.float32] | RlhfRayError]:
        """The rewards of each batch, or why there are none; after one that was the end of the process,
        another process goes on."""
        left = list(batches)
        while left:
            child = self._started()
            child.connection.send([(b.prompts, b.completions, b.rollouts.columns) for b in left])
            while left and self._child is child:
                del left[0]
                yield self._next_answer(child)

    def _next_answer(self, child: _Child) -> NDArray[np.float32] | RlhfRayError:
        start = time.monotonic()
        try:
            return cast(NDArray[np.float32] | RlhfRayError, child.receive(self.timeout + GRACE))
        except TimeoutError:
            self._kill()
        except EOFError:
            code = self._kill()
            # Its own limit ends it with 1. That clock began to run when it had sent the last answer, which
            # may be a little before this one.
            if code != 1 or time.monotonic() - start < self.timeout / 2:
                return RewardError(f"reward '{self.name}': its process died with exit code {code}")
        return RewardError(
            f"reward '{self.name}' did not answer within timeout={self.timeout:g} s and was killed; "
            "the log of the reward actor shows where it was"
        )

    def _started(self) -> _Child:
        if self._child is not None and self._child.process.poll() is not None:
            self._kill()
        if self._child is None:
            self._child = _Child()
            self._child.connection.send((self.name, self.function, self.timeout))
            try:
                failure = self._child.receive(BUILD_TIMEOUT)
            except (TimeoutError, EOFError) as error:
                code = self._kill()
                raise RewardError(f"reward '{self.name}': its process did not start ({code})") from error
            if isinstance(failure, RlhfRayError):
                self._kill()
                raise failure
        return self._child

    def _kill(self) -> int:
        """Exit code of the process."""
        assert self._child is not None
        code = self._child.kill()
        self._child = None
        return code

    def close(self) -> None:
        if self._child is not None:
            self._kill()


class _Child:
    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_ray.rewards.child", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()

    def receive(self, timeout: float) -> object:
        """Raises: TimeoutError; EOFError when the process died."""
        if not self.connection.poll(timeout):
            raise TimeoutError
        try:
            return self.connection.recv()
        except ConnectionResetError as error:
            raise EOFError from error

    def kill(self) -> int:
        """With all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        return self.process.wait()


def main(descriptor: int) -> None:
    connection = Connection(descriptor)
    name, function, timeout = connection.recv()
    try:
        scorer = RewardFunction(name, _built(function))
    except Exception as error:  # importing a person's module may raise anything
        connection.send(error if isinstance(error, RlhfRayError) else _refused(name, error))
        return
    connection.send(None)
    while True:
        try:
            batches = connection.recv()
        except EOFError:  # the parent has gone
            return
        for arguments in batches:
            # In C: it fires whatever Python is doing, says where that was, and outlives a killed parent.
            faulthandler.dump_traceback_later(timeout, exit=True)
            answer: object
            try:
                answer = scorer(*arguments)
            except RewardError as error:
                answer = error
            faulthandler.cancel_dump_traceback_later()
            connection.send(answer)


def _built(function: str | TextVerifier) -> str | TextFunction:
    if isinstance(function, str):
        return function
    from rlhf_ray.rewards.verifiers import text_verifier

    return text_verifier(function)


def _refused(name: str, error: Exception) -> ConfigError:
    return ConfigError(f"reward '{name}': importing it raised {type(error).__name__}: {error}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
