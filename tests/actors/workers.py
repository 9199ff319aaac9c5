"""Workers for tests of the actors themselves. Nothing of them is a role."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time

import numpy as np
import ray
from numpy.typing import NDArray

from rlhf_ray import errors


class Worker:
    """
    Args:
        rank: of this worker; some methods misbehave on one rank only.
        fails: name of an error class of `rlhf_ray.errors` that the constructor raises.
    """

    def __init__(self, rank: int = 0, fails: str | None = None) -> None:
        self.rank = rank
        self.calls: list[object] = []
        if fails is not None:
            raise getattr(errors, fails)("model.path=nowhere: no such folder", "model: second mistake")

    def who(self) -> tuple[int, int]:
        return self.rank, os.getpid()

    def title(self) -> str:
        """Of this process, as `ps` shows it."""
        with open("/proc/self/cmdline") as line:
            return line.read().rstrip("\0")

    def tagged(self, value: int) -> int:
        """A value that says which rank made it."""
        return 100 * self.rank + value

    async def who_async(self) -> tuple[int, int]:
        """For hosts whose calls run beside each other."""
        return self.who()

    def later(self, seconds: float, value: object) -> object:
        time.sleep(seconds)
        return value

    def hang_once(self, path: str) -> str:
        """Whoever finds no file there makes one, and hangs."""
        if not os.path.exists(path):
            open(path, "w").close()
            time.sleep(600)
        return "answered"

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def place(self) -> str:
        """The node and the GPUs of this process, by Ray, as JSON."""
        context = ray.get_runtime_context()
        return json.dumps(
            {"node": context.get_node_id(), "gpus": context.get_accelerator_ids().get("GPU", [])}
        )

    def rest(self) -> None:
        self.calls.append("rest")

    def publish(self) -> None:
        self.calls.append("publish")

    def wake(self, weights_only: bool) -> None:
        self.calls.append("wake weights" if weights_only else "wake")

    def both(self, value: int) -> tuple[int, int]:
        return value, -value

    def add(self, *values: int) -> int:
        return sum(values)

    def remember(self, value: object) -> None:
        self.calls.append(value)

    def remembered(self) -> list[object]:
        return self.calls

    def slow_array(self, seconds: float, size: int) -> NDArray[np.int64]:
        time.sleep(seconds)
        return np.arange(size)

    def look_at(self, array: NDArray[np.int64]) -> tuple[int, bool]:
        """Sum, and whether the array may be written to (one that lies in the object store may not)."""
        return int(array.sum()), bool(array.flags.writeable)

    async def nap(self, seconds: float, fails: bool = False) -> float:
        """For hosts whose calls run beside each other."""
        await asyncio.sleep(seconds)
        if fails:
            raise errors.RewardError("said by the worker")
        return seconds

    def sleep(self, seconds: float, rank: int | None = None) -> None:
        if rank is None or rank == self.rank:
            time.sleep(seconds)

    def fail(self, name: str, rank: int = 0) -> None:
        """Raise on one rank; the others wait for it for a long time, as ranks in a collective do."""
        if rank != self.rank:
            time.sleep(60)
        raise getattr(errors, name)("online.rewards.0: said by the worker")

    def divide(self, by: int) -> float:
        return 1 / by

    def die(self, rank: int = 0) -> None:
        if rank != self.rank:
            time.sleep(60)
        os._exit(3)

    def die_later(self, seconds: float) -> None:
        """The process is killed while it is idle."""
        threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()

    def lose_peer(self) -> None:
        """Rank 1 dies; the others fail at once, as a collective whose connection is lost does."""
        if self.rank == 1:
            os._exit(3)
        raise RuntimeError("connection closed by peer")


class Restless(Worker):
    def rest(self) -> None:
        raise RuntimeError("no")


class Diarist:
    """Notes what happens to it in a file that all share."""

    def __init__(self, name: str, diary: str) -> None:
        self.name, self.diary = name, diary
        self.note("built")

    def note(self, what: str) -> None:
        with open(self.diary, "a") as diary:
            diary.write(f"{self.name} {what}\n")

    def rest(self) -> None:
        self.note("rests")

    def wake(self, weights_only: bool) -> None:
        self.note("wakes")

    def work(self, seconds: float, *after: object) -> str:
        self.note("begins")
        time.sleep(seconds)
        self.note("ends")
        return self.name
