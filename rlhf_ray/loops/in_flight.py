"""What was begun and is not trained on yet: how asynchrony stays within its bounds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from rlhf_ray.errors import RlhfRayError

T = TypeVar("T")


@dataclass(frozen=True)
class Begun(Generic[T]):
    """A batch under way.

    Fields:
        rows: of the dataset. version: of the weights that were current when it began.
    """

    rows: tuple[int, ...]
    version: int
    work: T


class InFlight(Generic[T]):
    """Batches under way, in the order in which they began.

    Every batch that is taken makes the weights one version newer. So a batch that began with `max_lag` others
    before it is taken `max_lag` versions later: staleness is bounded by how many may be in flight.

    Args:
        max_lag: versions by which a batch may be behind when it is taken; 0 is synchronous.
    """

    def __init__(self, max_lag: int) -> None:
        self.max_lag = max_lag
        self._begun: deque[Begun[T]] = deque()

    def __len__(self) -> int:
        return len(self._begun)

    @property
    def is_full(self) -> bool:
        return len(self) > self.max_lag

    @property
    def rows(self) -> list[int]:
        """Of all batches, oldest first: drawn from the dataset, and not trained on."""
        return [row for begun in self._begun for row in begun.rows]

    def add(self, begun: Begun[T]) -> None:
        assert not self.is_full, "more in flight than max_lag allows"
        self._begun.append(begun)

    def take(self, version: int) -> Begun[T]:
        """The oldest batch, to train weights of `version` on.

        Raises:
            RlhfRayError: it is older than `max_lag` allows.
        """
        oldest = self._begun.popleft()
        if not 0 <= version - oldest.version <= self.max_lag:
            raise RlhfRayError(
                f"a batch that began with weights of version {oldest.version} would train version {version}; "
                f"online.max_lag={self.max_lag}"
            )
        return oldest
