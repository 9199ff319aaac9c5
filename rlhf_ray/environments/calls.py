"""Calls of a user's code, side by side and with a deadline each."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from rlhf_ray.errors import EnvironmentFailure

T = TypeVar("T")


def call_all(
    calls: Sequence[Callable[[], T]], num_threads: int, timeout: float
) -> list[T | EnvironmentFailure]:
    """The results in the order of the calls; a failure where a call raised or took longer than `timeout`.

    A thread cannot be stopped from outside. One that hangs is left behind: it takes no one's place, and it
    does not keep the process from ending.

    Args:
        num_threads: calls that run at a time. timeout: seconds that each may take.
    """
    results: list[T | EnvironmentFailure] = [_late(timeout)] * len(calls)
    ended: queue.SimpleQueue[tuple[int, T | EnvironmentFailure]] = queue.SimpleQueue()
    waiting = list(reversed(range(len(calls))))
    deadlines: dict[int, float] = {}
    while waiting or deadlines:
        while waiting and len(deadlines) < num_threads:
            index = waiting.pop()
            deadlines[index] = time.monotonic() + timeout
            threading.Thread(target=_run, args=(index, calls[index], ended), daemon=True).start()
        try:
            index, result = ended.get(timeout=max(0.0, min(deadlines.values()) - time.monotonic()))
        except queue.Empty:
            now = time.monotonic()
            deadlines = {index: end for index, end in deadlines.items() if end > now}
            continue
        if deadlines.pop(index, None) is not None:
            results[index] = result
    return results


def _run(
    index: int, call: Callable[[], T], ended: queue.SimpleQueue[tuple[int, T | EnvironmentFailure]]
) -> None:
    try:
        ended.put((index, call()))
    except EnvironmentFailure as failure:
        ended.put((index, failure))
    except Exception as error:  # the user's own code may raise anything
        ended.put((index, EnvironmentFailure(f"raised {type(error).__name__}: {error}")))


def _late(timeout: float) -> EnvironmentFailure:
    return EnvironmentFailure(f"no answer within {timeout:g} s")
