"""What a source of reward is, and what is asked of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.errors import RewardError
from rlhf_ray.types import Message, Rollouts, Rows


@dataclass(frozen=True)
class Samples(Rows):
    """Answers to judge.

    Fields:
        completions: [B] decoded, without special tokens.
        rollouts: the same B answers as tokens, with their conversations and the dataset's columns.
    """

    completions: tuple[str, ...]
    rollouts: Rollouts

    @property
    def prompts(self) -> tuple[tuple[Message, ...], ...]:
        return self.rollouts.messages

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> Samples:
        return Samples(tuple(self.completions[int(row)] for row in rows), self.rollouts.select(rows))


@dataclass(frozen=True)
class Values:
    """
    Fields:
        rewards: [B] float32, NaN where the source has nothing to say.
        spread: [B] float32, how far its members are apart; None where it has none.
        failures: row -> why there is no reward for it, though there is for others.
    """

    rewards: NDArray[np.float32]
    spread: NDArray[np.float32] | None = None
    failures: dict[int, str] = field(default_factory=dict)


class RewardSource(Protocol):
    async def score(self, samples: Samples) -> Values:
        """
        Raises:
            RewardError: no rewards could be had; whether that ends the run is not the source's to decide.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


def as_lists(columns: Sequence[dict[str, object]]) -> dict[str, list[object]]:
    """Rows of columns as columns of rows; None where a row lacks one."""
    names = sorted(set().union(*columns)) if columns else []
    return {name: [row.get(name) for row in columns] for name in names}


def checked(name: str, rewards: object, count: int) -> NDArray[np.float32]:
    """[B] float32 of what a function or a server returned, None as NaN.

    Raises:
        RewardError: the wrong number or kind of values.
    """
    if not isinstance(rewards, Sequence | np.ndarray) or len(rewards) != count:
        found = (
            f"{len(rewards)} values" if isinstance(rewards, Sequence | np.ndarray) else type(rewards).__name__
        )
        raise RewardError(f"reward '{name}' returned {found} for {count} completions")
    return np.asarray([_number(name, reward) for reward in rewards], dtype=np.float32)


def _number(name: str, reward: object) -> float:
    if reward is None:
        return np.nan
    try:
        value = float(reward)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward '{name}' returned {reward!r}, not a number or None") from error
    if not np.isfinite(value):
        raise RewardError(f"reward '{name}' returned {value}")
    return value
