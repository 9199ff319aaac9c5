"""What surrounds a loop: where metrics go, when to stop, where checkpoints are. The loops only call it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Protocol

from rlhf_ray.errors import Interrupted
from rlhf_ray.loops.checkpoints import Checkpoints, State
from rlhf_ray.reporting.metrics_log import MetricsLog, read_metrics
from rlhf_ray.reporting.progress import Progress
from rlhf_ray.reporting.run_folder import RunFolder
from rlhf_ray.roles import Trained
from rlhf_ray.types import Metrics


def no_timings() -> Metrics:
    return {}


class Recoveries(Protocol):
    """Counts what was lost while the stage ran, and made up for."""

    def begun(self) -> None:
        """The first step begins."""
        ...

    def step_done(self, step: int) -> Metrics:
        """What to log beside the step's own metrics; nothing where nothing was lost."""
        ...


class NothingLost:
    def begun(self) -> None:
        pass

    def step_done(self, step: int) -> Metrics:
        return {}


def last_logged(path: Path) -> Metrics:
    """The metrics of the last step in a `metrics.jsonl`; {} if it has none."""
    rows = read_metrics(path)
    return {name: value for name, value in rows[-1].items() if isinstance(value, float)} if rows else {}


def num_logged(folder: RunFolder) -> int:
    """Steps of which the metrics are there."""
    return len(read_metrics(folder.metrics_path)) if folder.metrics_path.exists() else 0


@dataclass
class StageRun:
    """
    Fields:
        open_log: opens the metrics log at the first step that will be logged.
        first_step: steps of the stage that another loop did before; this loop's own count from 0.
        interrupt: set when the person asked to stop, or the deadline has come; the loop saves after the step
            it is in.
        timings: seconds of each kind of work since it was last asked (`time/...`).
        recoveries: of the actors that do the work.
    """

    name: str
    folder: RunFolder
    seed: int
    checkpoints: Checkpoints
    progress: Progress
    open_log: Callable[[int], MetricsLog]
    interrupt: Event
    timings: Callable[[], Metrics] = no_timings
    recoveries: Recoveries = field(default_factory=NothingLost)
    first_step: int = 0
    last_metrics: Metrics = field(default_factory=dict)
    _log: MetricsLog | None = None
    _step_began: float = field(default_factory=time.monotonic)

    def begin(self, start: int, total_steps: int) -> None:
        """The loop is about to run step `start` of `total_steps`.

        Raises:
            Interrupted: the person asked to stop while the roles started.
        """
        self.stop_if_asked(start)
        total_steps += self.first_step
        self.progress.stage(self.name, total_steps)
        self._log = self.open_log(self.first_step + start)
        if start:
            self.progress.message(f"{self.name}: resumed at step {self.first_step + start} of {total_steps}")
            self.last_metrics = last_logged(self.folder.metrics_path)
        self.recoveries.begun()
        self.restart_clock()

    def restart_clock(self) -> None:
        """What was done until now belongs to no step."""
        self.timings()
        self._step_began = time.monotonic()

    def log(self, step: int, metrics: Metrics) -> None:
        """Step `step` (from 0) is done."""
        step += self.first_step
        assert self._log is not None, "begin first"
        now = time.monotonic()
        seconds = now - self._step_began
        self._step_began = now
        timings = {**self.timings(), "time/step": seconds}
        if "time/busy" in timings:
            timings["time/overhead"] = max(0.0, 1.0 - timings.pop("time/busy") / seconds)
        tokens = metrics.get("perf/generated_tokens", metrics.get("perf/trained_tokens"))
        speed = {} if tokens is None else {"perf/tokens_per_second": tokens / seconds}
        self.last_metrics = {**metrics, **speed, **timings, **self.recoveries.step_done(step)}
        self._log.log(step, self.last_metrics)
        self.progress.step(step + 1, self.last_metrics)

    def save_or_stop(self, done: int, models: Mapping[str, Trained], state: Callable[[], State]) -> None:
        """Save a checkpoint if one is due, if the last step was the best, or if the person asked to stop.

        Args:
            done: number of steps done.

        Raises:
            Interrupted: after saving.
        """
        if self.interrupt.is_set() or self.checkpoints.is_due(done, self.last_metrics):
            if self._log is not None:
                self._log.sync()
            self.checkpoints.save(done, models, state(), self.last_metrics)
        self.stop_if_asked(done)

    def stop_if_asked(self, done: int) -> None:
        """For loops that keep what they made in files of their own, step by step.

        Args:
            done: number of steps done.

        Raises:
            Interrupted: the person asked to stop.
        """
        if self.interrupt.is_set():
            done += self.first_step
            where = f"after step {done}, saved" if done else "before its first step"
            raise Interrupted(f"{self.name}: stopped {where}; go on with --resume")

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
