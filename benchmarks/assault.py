"""Killing the processes of a run, at moments that spread over its steps."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.victims import REPEATED, Nodes, kill, phase, processes, steps_logged

HASTY, HASTE = 0.2, (1.0, 9.0)
"""The share of kills that fall into what the kill before them has caused, and how many seconds after it. All
others wait until the run has ended more steps than it had then."""
LATER = 0.2
"""At most, in seconds: how long after a phase was seen the kill follows."""
PATIENCE = 600.0
"""Seconds that a run has to reach the step of the next kill, or its end."""


@dataclass(frozen=True)
class Kill:
    """Fields: whom: role or `node`. step: under way, from 0. phase: of `victims.PHASES`."""

    whom: str
    step: int
    phase: str

    def __str__(self) -> str:
        return f"{self.whom} in step {self.step} ({self.phase})"


@dataclass
class Assault:
    """What is done to a run, drawn from a seed.

    Fields:
        run: its folder. steps: that it has. most: kills.
        cluster: whose nodes are killed; None kills single processes.
        furthest: steps logged at the last kill, the most so far.
    """

    run: Path
    process: subprocess.Popen[bytes]
    chance: random.Random
    steps: int
    most: int
    cluster: Nodes | None
    kills: list[Kill]
    furthest: int = -1

    def go_on(self) -> None:
        """
        Raises:
            TimeoutError: the run stands still.
        """
        while len(self.kills) < self.most and self.await_moment():
            self.strike()
        self.wait_until(lambda: False, "end")

    def await_moment(self) -> bool:
        """Whether the run is still there then."""
        if self.kills and self.chance.random() < HASTY:
            time.sleep(self.chance.uniform(*HASTE))
        else:
            # So that the kills spread over all steps, and not by how long each phase takes.
            wanted = self.furthest + self.chance.randint(1, 2 * self.steps // (self.most + 1) - 1)
            at = self.chance.choice(REPEATED)
            self.wait_until(lambda: self.has_begun and steps_logged(self.run) >= wanted, f"step {wanted}")
            self.wait_until(lambda: phase(processes(self.run).values()) == at, f"next {at}")
            time.sleep(self.chance.uniform(0, LATER))
        return self.process.poll() is None

    @property
    def has_begun(self) -> bool:
        """Before the roles are there, nothing could be lost."""
        return (self.run / "metrics.jsonl").exists()

    def wait_until(self, is_reached: Callable[[], bool], what: str) -> None:
        """Or until the run ends."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and not is_reached():
            if time.monotonic() > deadline:
                raise TimeoutError(f"did not reach its {what} within {PATIENCE:g} s")
            time.sleep(0.02)

    def strike(self) -> None:
        there = processes(self.run)
        roles = sorted({name.split("-")[0] for name in there})
        if not roles:
            return
        steps = steps_logged(self.run)
        if self.cluster is not None:
            own = Kill("node", steps, phase(there.values()))
            self.cluster.kill(self.chance.randrange(2))
            self.cluster.add()
        else:
            role = self.chance.choice(roles)
            victim = self.chance.choice(sorted(name for name in there if name.split("-")[0] == role))
            own = Kill(victim, steps, phase(there.values()))
            if not kill(there[victim]):
                return
        self.kills.append(own)
        self.furthest = max(self.furthest, steps)
