"""Checkpoints of a stage: whole or absent, the newest few kept."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rlhf_ray.config.schema import KeepBestSection
from rlhf_ray.data.cursor import Cursor
from rlhf_ray.errors import CheckpointError, DiskFullError
from rlhf_ray.reporting.files import (
    free_space,
    naming_a_full_disk,
    shown_size,
    size_of,
    sync,
    sync_tree,
    write_text,
)
from rlhf_ray.roles import Trained
from rlhf_ray.types import Metrics

STATE_FILE = "state.json"
BEST_MODEL = "best-model"
"""The model of the checkpoint with the best metric, as other tools read it."""
JUDGED = "judged"
"""In the state: the metric of `keep_best` -> its value."""
NO_METRICS: Metrics = {}
State = dict[str, object]


def restored_step(state: State) -> int:
    """The step at which a resumed run goes on."""
    step = state["step"]
    assert isinstance(step, int)
    return step


def restored_cursor(state: State, num_rows: int) -> Cursor:
    """
    Args:
        num_rows: of the dataset that training would go on with.

    Raises:
        CheckpointError: the checkpoint was made with a dataset of another size, or is damaged.
    """
    cursor = Cursor.from_state(state["cursor"])  # type: ignore[arg-type]
    if cursor.num_rows != num_rows:
        raise CheckpointError(
            f"the checkpoint was made with a dataset of {cursor.num_rows} usable rows, and now there are "
            f"{num_rows}: rows would be trained on twice or never; resume with the dataset and the limits of "
            "the first run, or start a new run in another output_dir"
        )
    return cursor


@dataclass(frozen=True)
class Checkpoints:
    """`folder/step-000012/`: `state.json`, and a folder a model with weights, optimizer, schedule and RNG.

    A checkpoint is written beside its place, brought to the disk, and renamed into its place: what has the
    final name is complete, also after a power cut. What goes away is renamed first, for the same reason.

    Fields:
        every: steps between checkpoints; None saves only when asked. keep_last: how many are kept.
        keep_best: a metric; the checkpoint that has the best one is kept too, with the model as a folder for
            other tools.
    """

    folder: Path
    every: int | None
    keep_last: int
    keep_best: KeepBestSection | None = None

    def is_due(self, step: int, metrics: Metrics = NO_METRICS) -> bool:
        """Args: step: number of steps done. metrics: of the last of them."""
        is_regular = self.every is not None and step % self.every == 0
        return is_regular or self._is_better(metrics)

    def save(
        self, step: int, models: Mapping[str, Trained], state: State, metrics: Metrics = NO_METRICS
    ) -> None:
        """
        Args:
            step: number of steps done, that is, the step at which a resumed run goes on.
            models: name of its sub-folder -> the model; the first is the one that the stage is for.
            state: everything else, as JSON: cursor, controllers, normalisers.
            metrics: of the last step.

        Raises:
            DiskFullError: there is no room. Nothing is left of it, and the checkpoint before it is whole.
        """
        final = self.folder / f"step-{step:06d}"
        if final.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".{final.name}.incomplete"
        _remove(aside)
        try:
            with naming_a_full_disk(final):
                self._check_room(final)
                self._write(aside, step, models, state, metrics)
        except Exception as error:
            written = size_of(aside)
            _remove(aside)
            if isinstance(error, DiskFullError):
                raise DiskFullError(self._no_room(step, written, error)) from error
            raise
        aside.rename(final)
        sync(self.folder)
        for old in self._not_kept():
            _remove(old)

    def _write(
        self, aside: Path, step: int, models: Mapping[str, Trained], state: State, metrics: Metrics
    ) -> None:
        aside.mkdir()
        pending = [model.save_state(aside / name) for name, model in models.items()]
        if self._is_better(metrics):
            pending.append(next(iter(models.values())).save_model(aside / BEST_MODEL))
        for each in pending:
            each.result()
        value = self._metric(metrics)
        judged = {} if value is None or not self.keep_best else {JUDGED: {self.keep_best.metric: value}}
        (aside / STATE_FILE).write_text(json.dumps({"step": step, **state, **judged}))
        sync_tree(aside)

    def latest(self) -> tuple[Path, State] | None:
        """The newest complete checkpoint and its state; what a save that was cut off has left is removed.

        Raises:
            CheckpointError: it is damaged.
        """
        for left in self.folder.glob(".step-*"):
            _remove(left)
        complete = self._complete()
        return (complete[-1], _read_state(complete[-1])) if complete else None

    def load_models(self, folder: Path, models: Mapping[str, Trained]) -> None:
        for each in [model.load_state(folder / name) for name, model in models.items()]:
            each.result()

    def take_best_model(self, target: Path) -> str | None:
        """Move the best model to `target`; returns what it is, None where there is none.

        It is a Hugging Face folder, with the step and the metric in `best.json`.
        """
        best = self._best()
        if best is None or not (best / BEST_MODEL).exists():
            return None
        state = _read_state(best)
        judged = {"step": restored_step(state), **self._judged(state)}
        write_text(best / BEST_MODEL / "best.json", json.dumps(judged) + "\n")
        _remove(target)
        (best / BEST_MODEL).rename(target)
        return ", ".join(f"{name} {value:.4g}" for name, value in judged.items())

    def clear(self) -> None:
        """Remove all: the stage is done, and its model is saved."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _complete(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _not_kept(self) -> list[Path]:
        best = self._best()
        return [path for path in self._complete()[: -self.keep_last] if path != best]

    # The best

    def _best(self) -> Path | None:
        """The complete checkpoint with the best metric, the first of equals."""
        if self.keep_best is None:
            return None
        judged = [(path, self._judged(_read_state(path))) for path in self._complete()]
        values = {path: found[self.keep_best.metric] for path, found in judged if found}
        choose = max if self.keep_best.mode == "max" else min
        return choose(values, key=lambda path: values[path]) if values else None

    def _is_better(self, metrics: Metrics) -> bool:
        """Whether the metric is better than in any checkpoint that is there."""
        value, best = self._metric(metrics), self._best()
        if value is None or self.keep_best is None:
            return False
        if best is None:
            return True
        earlier = self._judged(_read_state(best))[self.keep_best.metric]
        return value > earlier if self.keep_best.mode == "max" else value < earlier

    def _metric(self, metrics: Metrics) -> float | None:
        """None where the step has none: it was not evaluated, or nothing could be said."""
        value = metrics.get(self.keep_best.metric) if self.keep_best else None
        return None if value is None or not math.isfinite(value) else float(value)

    def _judged(self, state: State) -> dict[str, float]:
        """The metric that a checkpoint was judged by, if it is that of `keep_best`; else {}."""
        found = cast(dict[str, float], state.get(JUDGED, {}))
        return found if self.keep_best and self.keep_best.metric in found else {}

    # Room

    def _check_room(self, final: Path) -> None:
        """The last checkpoint says how large the next one will be.

        Raises:
            DiskFullError: less is free.
        """
        needed = self._size()
        if needed > free_space(self.folder):
            raise DiskFullError(f"{final}: the disk is full")

    def _size(self) -> int:
        """Bytes of the largest checkpoint that is there."""
        return max(map(size_of, self._complete()), default=0)

    def _no_room(self, step: int, written: int, error: DiskFullError) -> str:
        before = self._complete()
        about, state = "more than", "There is none before it"
        if before:
            about, state = "about", f"{before[-1].name} is whole"
        needed, free = shown_size(max(self._size(), written)), shown_size(free_space(self.folder))
        return (
            f"{error}: the checkpoint of step {step} needs {about} {needed}, and {free} are free in "
            f"{self.folder}. {state}; make room, or lower checkpoint.keep_last, and go on with --resume"
        )


def _read_state(folder: Path) -> State:
    """Raises: CheckpointError: it is damaged."""
    try:
        return cast(State, json.loads((folder / STATE_FILE).read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: {error}; remove this folder to resume from an earlier one"
        ) from None


def _remove(folder: Path) -> None:
    """A folder that is cut off while it goes away must not look like a whole one."""
    if not folder.exists():
        return
    going = folder.with_name(f".{folder.name.lstrip('.').removesuffix('.incomplete')}.going")
    shutil.rmtree(going, ignore_errors=True)
    folder.rename(going)
    # Another machine may still be writing into it; what is left goes at the next start.
    shutil.rmtree(going, ignore_errors=True)
