"""What was begun and is not trained on yet: how asynchrony stays within its bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rlhf_ray.errors import RlhfRayError

T = TypeVar("T")


@dataclass(frozen=True)
class Begun(Generic[T]):
    """Prompts that are being answered: a whole batch, or one.

    Fields:
        rows: of the dataset. version: of the weights that were current when it began.
    """

    rows: tuple[int, ...]
    version: int
    work: T


Choose = Callable[[Sequence[T], int], Sequence[int]]
"""Waits until so many pieces of work are done, and says which."""


class InFlight(Generic[T]):
    """Work under way, in the order in which it began.

    Every batch that is taken makes the weights one version newer. So with room for `max_lag` + 1 batches,
    what began is the oldest, and taken, `max_lag` versions later: how much may be in flight bounds how old it
    can become. Where not the oldest is taken but what is done first, the bound is kept by giving up.

    Args:
        capacity: prompts.
        max_lag: versions by which work may be behind when it is taken; 0 is synchronous.
    """

    def __init__(self, capacity: int, max_lag: int) -> None:
        self.capacity = capacity
        self.max_lag = max_lag
        self._begun: list[Begun[T]] = []

    def __len__(self) -> int:
        """Prompts."""
        return len(self.rows)

    @property
    def rows(self) -> list[int]:
        """Of all prompts, oldest first: drawn from the dataset, and not trained on."""
        return [row for begun in self._begun for row in begun.rows]

    @property
    def room(self) -> int:
        """Prompts that may begin."""
        return self.capacity - len(self)

    def add(self, begun: Sequence[Begun[T]]) -> None:
        self._begun += begun
        assert self.room >= 0, "more in flight than allowed"

    def take(self, version: int, num_prompts: int, choose: Choose[T] | None = None) -> list[Begun[T]]:
        """Prompts to train weights of `version` on, oldest first.

        Args:
            choose: which, where every piece of work is one prompt; None takes the oldest.

        Raises:
            RlhfRayError: one of them is older than `max_lag` allows.
        """
        if choose is None:
            count = next(n for n in range(len(self._begun) + 1) if self._prompts_of(n) >= num_prompts)
            chosen: Sequence[int] = range(count)
        else:
            chosen = sorted(choose([begun.work for begun in self._begun], num_prompts))
        taken = [self._begun[index] for index in chosen]
        self._begun = [begun for index, begun in enumerate(self._begun) if index not in set(chosen)]
        for begun in taken:
            if not 0 <= version - begun.version <= self.max_lag:
                raise RlhfRayError(
                    f"answers that began with weights of version {begun.version} would train version "
                    f"{version}; online.max_lag={self.max_lag}"
                )
        return taken

    def give_up(self, version: int) -> list[Begun[T]]:
        """What would be too old to train weights of `version` on; it is in flight no longer."""
        late = [begun for begun in self._begun if version - begun.version > self.max_lag]
        self._begun = [begun for begun in self._begun if version - begun.version <= self.max_lag]
        return late

    def _prompts_of(self, count: int) -> int:
        return sum(len(begun.rows) for begun in self._begun[:count])
