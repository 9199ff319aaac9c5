"""Checkpoints of a stage: whole or absent, the newest few kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.data.cursor import Cursor
from rlhf_ray.errors import CheckpointError
from rlhf_ray.roles import Trained

STATE_FILE = "state.json"
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

    A checkpoint is written beside its place and renamed into it: what has the final name is complete.

    Fields:
        every: steps between checkpoints; None saves only when asked. keep_last: how many are kept.
    """

    folder: Path
    every: int | None
    keep_last: int

    def is_due(self, step: int) -> bool:
        """Args: step: number of steps done."""
        return self.every is not None and step % self.every == 0

    def save(self, step: int, models: Mapping[str, Trained], state: State) -> None:
        """
        Args:
            step: number of steps done, that is, the step at which a resumed run goes on.
            models: name of its sub-folder -> the model.
            state: everything else, as JSON: cursor, controllers, normalisers.
        """
        final = self.folder / f"step-{step:06d}"
        if final.exists():
            return
        aside = self.folder / f".{final.name}.incomplete"
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
        pending = [model.save_state(aside / name) for name, model in models.items()]
        for each in pending:
            each.result()
        with (aside / STATE_FILE).open("w") as file:
            json.dump({"step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(final)
        for old in self._complete()[: -self.keep_last]:
            shutil.rmtree(old)

    def latest(self) -> tuple[Path, State] | None:
        """The newest complete checkpoint and its state.

        Raises:
            CheckpointError: it is damaged.
        """
        complete = self._complete()
        if not complete:
            return None
        try:
            return complete[-1], json.loads((complete[-1] / STATE_FILE).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{complete[-1]}: {error}; remove this folder to resume from an earlier one"
            ) from None

    def load_models(self, folder: Path, models: Mapping[str, Trained]) -> None:
        for each in [model.load_state(folder / name) for name, model in models.items()]:
            each.result()

    def clear(self) -> None:
        """Remove all: the stage is done, and its model is saved."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _complete(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder.exists() else []
