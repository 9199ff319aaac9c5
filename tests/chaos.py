"""Killing the actors of a run from outside, as the kernel does."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from rlhf_ray.reporting.files import read_lines


def processes(run: Path) -> dict[str, int]:
    """Name of a role's actor (`policy`, `engine-1`) -> the process that plays it: the one that writes its
    log."""
    logs = (run / "logs").resolve()
    found = {}
    for process in psutil.process_iter():
        try:
            if not process.name().startswith("ray::"):
                continue
            log = Path(os.readlink(f"/proc/{process.pid}/fd/1"))
        except (psutil.NoSuchProcess, OSError):
            continue  # it ended while we looked
        if log.parent == logs:
            found[log.stem] = process.pid
    return found


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(read_lines(path)) if path.exists() else 0


@dataclass
class Killer:
    """Kills in a thread of its own, while the test's runs.

    Fields:
        plan: (steps that are logged, seconds to wait then, whom), one after the other.
        killed: whom, so far.
    """

    run: Path
    plan: list[tuple[int, float, str]]
    killed: list[str] = field(default_factory=list)

    def __enter__(self) -> Killer:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._kill_all, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _kill_all(self) -> None:
        for steps, seconds, whom in self.plan:
            self._wait_until(lambda steps=steps: steps_logged(self.run) >= steps)  # type: ignore[misc]
            time.sleep(seconds)
            self._wait_until(lambda whom=whom: whom in processes(self.run))  # type: ignore[misc]
            if self._stop.is_set():
                return
            os.kill(processes(self.run)[whom], signal.SIGKILL)
            self.killed.append(whom)

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition() and not self._stop.wait(0.02):
            pass
