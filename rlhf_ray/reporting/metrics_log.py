"""The metrics of a stage, step by step: always `metrics.jsonl`; wandb and TensorBoard when asked."""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rlhf_ray.config.schema import LoggingSection, WandbSection
from rlhf_ray.reporting.files import dump_line, read_lines, write_text
from rlhf_ray.reporting.run_folder import RunFolder
from rlhf_ray.types import Metrics

MetricsRow = dict[str, float | str]
"""One line of `metrics.jsonl`: `step`, `stage`, `time` (seconds since 1970, UTC) and the metrics."""


@dataclass(frozen=True)
class StageResult:
    """What a stage left: its folder, metrics of every step, and what `summarise` returned (or {})."""

    name: str
    folder: Path
    metrics: list[MetricsRow]
    summary: dict[str, object]


@dataclass(frozen=True)
class RunResult:
    folder: Path
    stages: list[StageResult]

    def stage(self, name: str) -> StageResult:
        return next(stage for stage in self.stages if stage.name == name)


def load_run(path: Path | str) -> RunResult:
    """The result of the run in the folder `path`, from disk; stages that have not started are left out.

    Raises:
        DataError: the folder holds no run, or a file of it is damaged.
    """
    root = RunFolder(path)
    record = root.read()
    folders = [root.stage(name) for name in record.stages] or [root]
    return RunResult(root.path, [_load_stage(folder) for folder in folders if folder.run_path.exists()])


def _load_stage(folder: RunFolder) -> StageResult:
    record = folder.read()
    metrics = read_metrics(folder.metrics_path) if folder.metrics_path.exists() else []
    return StageResult(record.name, folder.path, metrics, record.summary)


class Tracker(Protocol):
    """Another place that metrics go to."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends one JSON object a step; each line is on its way to the disk before `log` returns.

    Args:
        folder: of the stage.
        resume_step: the first step that will be logged. It and later ones, logged by an interrupted run after
            its last checkpoint, are dropped from the file: a resumed log equals an uninterrupted one.
        config: the resolved, redacted configuration, for wandb.
    """

    def __init__(
        self,
        folder: RunFolder,
        stage: str,
        logging: LoggingSection,
        *,
        config: Mapping[str, object],
        resume_step: int = 0,
    ) -> None:
        self._stage = stage
        self._last_step = resume_step - 1
        folder.path.mkdir(parents=True, exist_ok=True)
        if folder.metrics_path.exists():
            kept = [line for line in read_lines(folder.metrics_path) if _step(line) < resume_step]
            write_text(folder.metrics_path, "".join(map(dump_line, kept)))
        self._file = folder.metrics_path.open("a", encoding="utf-8")
        self._trackers: list[Tracker] = []
        if logging.tensorboard:
            self._trackers.append(TensorBoardTracker(folder, resume_step))
        if logging.wandb is not None:
            self._trackers.append(WandbTracker(folder, stage, logging.wandb, config))

    def log(self, step: int, metrics: Metrics) -> None:
        """Args: step: greater than that of any earlier call."""
        if step <= self._last_step:
            raise ValueError(f"step {step} was logged already; the last one was {self._last_step}")
        self._last_step = step
        numbers = {name: float(value) for name, value in metrics.items()}
        row = {"step": step, "stage": self._stage, "time": round(time.time(), 3), **numbers}
        self._file.write(dump_line(row))
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(step, numbers)

    def sync(self) -> None:
        """What was logged is on the disk: a checkpoint must not be ahead of it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorBoardTracker:
    def __init__(self, folder: RunFolder, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted run logged after its last checkpoint.
        self._writer = SummaryWriter(log_dir=str(folder.logs / "tensorboard"), purge_step=resume_step)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """One wandb run a stage, grouped by the run's folder; a resumed stage continues its wandb run."""

    def __init__(
        self, folder: RunFolder, stage: str, section: WandbSection, config: Mapping[str, object]
    ) -> None:
        import wandb

        id_path = folder.logs / "wandb_run_id"
        if not id_path.exists():
            write_text(id_path, uuid.uuid4().hex[:12])
        api_key = section.api_key.get_secret_value() if section.api_key is not None else None
        path = folder.path.resolve()
        run_name = (
            path.parent.name if path.name == stage else path.name
        )  # a pipeline's stage, or a run of one stage
        self._run = wandb.init(
            project=section.project,
            mode=section.mode,
            id=id_path.read_text(encoding="utf-8"),
            resume="allow",
            group=run_name,
            name=f"{run_name}/{stage}",
            dir=str(folder.logs),
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off", api_key=api_key),
        )
        # A step of its own, since wandb drops what is logged for a step before its last: the redone ones.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


def read_metrics(path: Path | str) -> list[MetricsRow]:
    """The rows of a `metrics.jsonl`, with NaN where a value was not finite.

    Raises:
        DataError: the file is missing or damaged.
    """
    return [
        {name: math.nan if value is None else value for name, value in row.items()}  # type: ignore[misc]
        for row in read_lines(Path(path))
    ]


def _step(row: Mapping[str, object]) -> int:
    step = row["step"]
    assert isinstance(step, int)
    return step
