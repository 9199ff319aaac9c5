"""What is known of a running pipeline: the state that every kind of progress display draws from."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf_ray.reporting.figures import key_figures
from rlhf_ray.types import Metrics

_RECENT_STEPS = 20


@dataclass
class StageState:
    """One stage.

    Fields:
        total, done: steps of the stage. started, ended: by the caller's clock, in seconds; None if not yet.
        metrics: the newest value of every metric. step_ends: when the latest steps ended.
    """

    name: str
    total: int = 0
    done: int = 0
    started: float | None = None
    ended: float | None = None
    metrics: Metrics = field(default_factory=dict)
    step_ends: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS + 1))

    @property
    def is_running(self) -> bool:
        return self.started is not None and self.ended is None

    @property
    def is_complete(self) -> bool:
        return self.ended is not None and self.done >= self.total

    @property
    def figures(self) -> list[str]:
        return key_figures(self.name, self.metrics)

    def elapsed(self, now: float) -> float:
        assert self.started is not None
        return (now if self.ended is None else self.ended) - self.started

    def remaining(self, now: float) -> float | None:
        """Seconds left at the pace of the latest steps; None before there is a pace.

        That takes two steps: the first one's time has the start-up in it.
        """
        if len(self.step_ends) < 2:
            return None
        (first, start), (last, end) = self.step_ends[0], self.step_ends[-1]
        left = (self.total - self.done) * (end - start) / (last - first)
        return max(0.0, left - (now - end))


class Board:
    """The stages in order, at most one of them running."""

    def __init__(self, names: Sequence[str]) -> None:
        self.stages = [StageState(name) for name in names]
        self.running: StageState | None = None

    def start(self, name: str, total_steps: int, now: float) -> StageState:
        """The named stage starts, or goes on with more steps; the one that ran before it is over."""
        self.stop(now)
        stage = next((stage for stage in self.stages if stage.name == name), None)
        if stage is None:
            raise ValueError(f"stage {name!r} is none of {[stage.name for stage in self.stages]}")
        stage.total, stage.ended = total_steps, None
        stage.step_ends.clear()  # the pace of other work
        stage.started = now if stage.started is None else stage.started
        self.running = stage
        return stage

    def step(self, step: int, metrics: Metrics, now: float) -> StageState:
        assert self.running is not None, "a step before the first stage"
        stage = self.running
        stage.done = step
        stage.metrics.update(metrics)
        stage.step_ends.append((step, now))
        return stage

    def stop(self, now: float) -> StageState | None:
        """The running stage is over, whether or not it did all its steps; None if none was running."""
        stage, self.running = self.running, None
        if stage is not None:
            stage.ended = now
        return stage

    def is_skipped(self, stage: StageState) -> bool:
        """Never started, though a later stage was: it was done by the run that this one resumes."""
        position = self.stages.index(stage)
        return stage.started is None and any(later.started is not None for later in self.stages[position:])
