"""What happens when processes or machines are lost: how often it is made up for, and how that is told.

An actor whose calls are functions of their arguments is replaced in its place (`actors.group`). Whatever else
is lost ends the stage's roles, and the stage goes on from its newest checkpoint with new ones.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from rlhf_ray.errors import RlhfRayError, WorkerLost
from rlhf_ray.reporting.files import dump_line
from rlhf_ray.types import Metrics

T = TypeVar("T")
ALL_ROLES = "all roles"


@dataclass
class Recoveries:
    """The losses of a stage, and what became of them.

    A loss counts against the limit until a step is done that was not done before. Each is a line of
    `recoveries.jsonl`, and so is each return.

    Fields:
        path: of that file. limit: losses of the same actor, or of all roles, in a row.
        say: tells the person.
    """

    path: Path
    limit: int
    say: Callable[[str], None]
    in_a_row: Counter[str] = field(default_factory=Counter)
    _furthest: int = -1
    _away: dict[str, float] = field(default_factory=dict)
    _since_step: Metrics = field(default_factory=dict)

    def lost(self, name: str, failure: RlhfRayError) -> None:
        """
        Raises:
            RlhfRayError: the failure, where it is one too many.
        """
        if self.in_a_row[name] >= self.limit:
            raise failure
        self.in_a_row[name] += 1
        self._away.setdefault(name, time.monotonic())
        again = f" ({self.in_a_row[name]} of {self.limit} in a row)" if self.in_a_row[name] > 1 else ""
        self.say(f"{failure}; {name} starts again{again}")
        self._write({"event": "lost", "name": name, "cause": str(failure)})

    def returned(self, name: str) -> None:
        seconds = time.monotonic() - self._away.pop(name)
        self._count("recovery/count", 1.0)
        self._count("recovery/seconds", seconds)
        self.say(f"{name}: back after {seconds:.1f} s")
        self._write({"event": "returned", "name": name, "seconds": round(seconds, 3)})

    def step_done(self, step: int) -> Metrics:
        """Of a step that is about to be logged: what was made up for since the last one, if anything was."""
        if step > self._furthest:
            self._furthest = step
            self.in_a_row.clear()
        metrics, self._since_step = self._since_step, {}
        return metrics

    def _count(self, metric: str, amount: float) -> None:
        self._since_step[metric] = self._since_step.get(metric, 0.0) + amount

    def _write(self, line: dict[str, object]) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **line}
        # A record of what went wrong must not be what goes wrong next: the disk may be full.
        with suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(dump_line(line))

    def run(self, stage: Callable[[], T]) -> T:
        """Run a stage, and where it loses what cannot be replaced in its place, again: it goes on from its
        newest checkpoint.

        Raises:
            WorkerLost: too often in a row.
        """
        while True:
            try:
                return stage()
            except WorkerLost as failure:
                # Replacements that were still on their way have gone with the rest.
                self._away = {name: since for name, since in self._away.items() if name == ALL_ROLES}
                self.lost(ALL_ROLES, failure)

    def begun(self) -> None:
        """The stage's roles are there, and its first step begins."""
        if ALL_ROLES in self._away:
            self.returned(ALL_ROLES)
