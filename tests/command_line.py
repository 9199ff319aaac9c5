"""The command `rlhf-ray` as a person starts it: a process of its own, with an exit code and two streams."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Running:
    """A command under way, in a session of its own, with all that it starts."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def wait(self, timeout: float) -> Finished:
        """Wait until it has ended; what it leaves running is killed. Fails after `timeout` seconds."""
        try:
            code = self.process.wait(timeout)
        finally:
            self.kill()
        return Finished(code, self.out.read_text(), self.err.read_text())

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"ended early: {self.err.read_text()}"
            assert time.monotonic() < deadline, f"not within {timeout} s: {self.out.read_text()}"
            time.sleep(0.02)

    def wait_and_find_left(self, timeout: float) -> tuple[Finished, list[str]]:
        """As `wait`, with the processes of the run that were still there shortly after it had ended."""
        begun = self._alive()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        # Ray's daemons end their workers, which takes them a moment.
        _, left = psutil.wait_procs({*begun, *self._alive()}, timeout=20)
        named = [str(process) for process in left]
        for process in left:
            process.kill()  # by `wait`, those that left the session would not be found again
        return self.wait(timeout), named

    def send(self, number: signal.Signals) -> None:
        """As `kill` does: to the command alone."""
        self.process.send_signal(number)

    def handles(self, number: signal.Signals) -> bool:
        """Whether the command has a handler for the signal by now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)

    def names(self) -> list[str]:
        """Of all its processes."""
        found = []
        for process in self._alive():
            try:
                found.append(process.name())
            except psutil.NoSuchProcess:
                continue
        return found

    def press_ctrl_c(self) -> None:
        """As a terminal does: to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL to everything at the same moment, as when a machine is switched off."""
        for process in self._alive():
            process.kill()
        self.process.wait(30)

    def _alive(self) -> list[psutil.Process]:
        """The processes of the session, and those that left it but descend from it."""
        found = {}
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid:
                    found |= {child.pid: child for child in [process, *process.children(recursive=True)]}
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue  # it ended while we looked
        return list(found.values())


class CommandLine:
    """Args: folder: where commands run, and where what they print is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0

    def start(self, *words: str | Path, **environment: str) -> Running:
        self._number += 1
        out, err = (self.folder / f"command-{self._number}.{name}" for name in ("out", "err"))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch", *map(str, words)],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **environment},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        return Running(process, out, err)

    def run(self, *words: str | Path, timeout: float = 240, **environment: str) -> Finished:
        return self.start(*words, **environment).wait(timeout)
