"""A file a step, so that a stage which makes data can stop and go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.errors import CheckpointError
from rlhf_ray.reporting.files import dump_line, read_lines, write_text
from rlhf_ray.types import Prompts


@dataclass(frozen=True)
class Parts:
    """
    Fields:
        folder: of the files. kind: what is in them; the first part of their names.
        principles: whose they are -> fingerprint, of the constitutions that the files are made by.
    """

    folder: Path
    kind: str
    prompts: Prompts
    prompts_per_step: int
    principles: Mapping[str, str]

    def __len__(self) -> int:
        """Number of steps, done or not."""
        return -(-len(self.prompts) // self.prompts_per_step)

    def path(self, step: int) -> Path:
        return self.folder / f"{self.kind}-{step:06d}.jsonl"

    def done(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.kind}-*.jsonl"))

    def left(self, start: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """The steps from `start` on, with the numbers of their prompts."""
        for step in range(start, len(self)):
            start = step * self.prompts_per_step
            yield step, np.arange(start, min(start + self.prompts_per_step, len(self.prompts)))

    def check_same_origin(self) -> None:
        """The files say which prompts they are about by their number alone, and what is still to be made must
        come from the same prompts and principles as they do.

        Raises:
            CheckpointError: those that are there come from others.
        """
        path = self.folder / "origin.json"
        own: dict[str, object] = {
            "prompts": len(self.prompts),
            "prompts_per_step": self.prompts_per_step,
            "fingerprint": _fingerprint(self.prompts),
            "principles": dict(self.principles),
        }
        if not path.exists():
            write_text(path, dump_line(own))
            return
        (found,) = read_lines(path)
        if found == own:
            return
        if any(found[key] != own[key] for key in ("prompts", "prompts_per_step")):
            difference = (
                f"was begun with {found['prompts']} prompts, {found['prompts_per_step']} a step, and now "
                f"there are {own['prompts']}, {own['prompts_per_step']} a step"
            )
        elif found["fingerprint"] != own["fingerprint"]:
            difference = "was begun with other prompts: the dataset has changed since"
        else:
            earlier = found["principles"]
            assert isinstance(earlier, dict)
            names = sorted(
                name
                for name in {*earlier, *self.principles}
                if earlier.get(name) != self.principles.get(name)
            )
            difference = f"was begun with other principles of {' and '.join(names)}"
        raise CheckpointError(
            f"{self.folder}: {difference}; resume with the same, or start a new run in another output_dir"
        )


def _fingerprint(prompts: Prompts) -> str:
    """Of all that is answered and judged by; columns of other types than JSON's count as Python shows
    them."""
    digest = hashlib.sha256()
    for row in zip(prompts.ids.tolist(), prompts.messages, prompts.columns, strict=True):
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode("ascii") + b"\n")
    return digest.hexdigest()
