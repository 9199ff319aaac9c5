"""Walks over a dataset for as long as training lasts, and says where it is in a few numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.errors import CheckpointError

CursorState = dict[str, int | list[int]]


class Cursor:
    """Row indices in a new seeded order every epoch, every row once an epoch.

    Batches have a constant size: the last of an epoch continues into the next.

    Args:
        num_rows: rows of the dataset, at least 1.
        seed: equal seeds give equal orders.
        position: rows handed out before, over all epochs.
        again: those of them that come again, before all others: nothing was made of them.
    """

    def __init__(self, num_rows: int, seed: int, position: int = 0, again: Sequence[int] = ()) -> None:
        if num_rows < 1 or seed < 0 or position < 0 or not all(0 <= row < num_rows for row in again):
            raise ValueError(f"num_rows={num_rows}, seed={seed}, position={position}: out of range")
        self.num_rows = num_rows
        self.seed = seed
        self.position = position
        self._again = list(again)
        self._order = self._order_of(self._epoch_number)

    @property
    def epoch(self) -> float:
        """How many times the dataset was handed out; 1.5 is the middle of the second time."""
        return self.position / self.num_rows

    def next(self, count: int) -> NDArray[np.int64]:
        """[count] indices of the next rows, which may be more than an epoch has."""
        parts: list[NDArray[np.int64]] = [np.array(self._again[:count], dtype=np.int64)]
        del self._again[:count]
        count -= len(parts[0])
        while count > 0:
            start = self.position % self.num_rows
            part = self._order[start : start + count]
            parts.append(part)
            count -= len(part)
            self.position += len(part)
            if self.position % self.num_rows == 0:
                self._order = self._order_of(self._epoch_number)
        return np.concatenate(parts)

    def give_back(self, rows: Sequence[int]) -> None:
        """Rows of which nothing was made come again, before all others."""
        self._again += rows

    def state(self, again: Sequence[int] = ()) -> CursorState:
        """JSON-able; the place of the next row that `next` will hand out.

        Args:
            again: rows that were handed out and not trained on, because batches are drawn ahead. The cursor
                of this state begins with them.
        """
        place: CursorState = {"num_rows": self.num_rows, "seed": self.seed, "position": self.position}
        waiting = [*again, *self._again]
        return {**place, "again": waiting} if waiting else place

    @classmethod
    def from_state(cls, state: CursorState) -> Cursor:
        """The cursor that goes on as if it had never stopped, also from the boundary of an epoch.

        Raises:
            CheckpointError: not a state that `state` returned.
        """
        try:
            return cls(state["num_rows"], state["seed"], state["position"], state.get("again", ()))  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"cursor state {state!r} is damaged ({error!r}); resume from another checkpoint"
            ) from error

    @property
    def _epoch_number(self) -> int:
        return self.position // self.num_rows

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        # The epoch is part of the seed, so any epoch's order is known without walking through the ones
        # before.
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
