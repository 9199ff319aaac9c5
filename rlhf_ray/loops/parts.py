"""A file a step, so that a stage which makes data can stop and go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.errors import CheckpointError
from rlhf_ray.reporting.files import dump_line, read_lines, write_text


@dataclass(frozen=True)
class Parts:
    """
    Fields:
        folder: of the files. kind: what is in them; the first part of their names.
    """

    folder: Path
    kind: str
    num_prompts: int
    prompts_per_step: int

    def __len__(self) -> int:
        """Number of steps, done or not."""
        return -(-self.num_prompts // self.prompts_per_step)

    def path(self, step: int) -> Path:
        return self.folder / f"{self.kind}-{step:06d}.jsonl"

    def done(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.kind}-*.jsonl"))

    def left(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """The steps that are still to be done, with the numbers of their prompts."""
        for step in range(len(self.done()), len(self)):
            start = step * self.prompts_per_step
            yield step, np.arange(start, min(start + self.prompts_per_step, self.num_prompts))

    def check_same_division(self) -> None:
        """The files say which prompts they are about by their number alone.

        Raises:
            CheckpointError: those that are there come from another number of prompts, or a step.
        """
        path = self.folder / "division.json"
        own = {"prompts": self.num_prompts, "prompts_per_step": self.prompts_per_step}
        if not path.exists():
            write_text(path, dump_line(own))
            return
        (found,) = read_lines(path)
        if found != own:
            raise CheckpointError(
                f"{self.folder}: was begun with {found['prompts']} prompts, {found['prompts_per_step']} a "
                f"step, and now there are {own['prompts']}, {own['prompts_per_step']} a step; resume with "
                "the same, or start a new run in another output_dir"
            )
