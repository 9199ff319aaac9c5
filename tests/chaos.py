"""Killing the actors of a run from outside, as the kernel does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.victims import kill, processes, steps_logged


@dataclass
class Killer:
    """Kills in a thread of its own, while the test's runs.

    Fields:
        plan: (steps that are logged, seconds to wait then, whom), one after the other: a role's actor, or
            something to call.
        killed: whom, so far.
        failure: of something that was called.
    """

    run: Path
    plan: list[tuple[int, float, str | Callable[[], None]]]
    killed: list[str] = field(default_factory=list)
    failure: Exception | None = None

    def __enter__(self) -> Killer:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._kill_all, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        if self.failure is not None and kind is None:
            raise self.failure

    def _kill_all(self) -> None:
        for steps, seconds, whom in self.plan:
            self._wait_until(lambda steps=steps: steps_logged(self.run) >= steps)  # type: ignore[misc]
            time.sleep(seconds)
            try:
                self._kill(whom)
            except Exception as failure:
                self.failure = failure
                return

    def _kill(self, whom: str | Callable[[], None]) -> None:
        if isinstance(whom, str):
            self._wait_until(lambda: whom in processes(self.run))
        if self._stop.is_set():
            return
        if isinstance(whom, str):
            kill(processes(self.run)[whom])
            self.killed.append(whom)
        else:
            whom()

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition() and not self._stop.wait(0.02):
            pass
