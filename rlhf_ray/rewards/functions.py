"""Reward functions by import path, with TRL's signature.

`f(prompts, completions, **columns) -> list[float | None]`, sync or async.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.types import Message


def import_function(path: str) -> Callable[..., object]:
    """
    Raises:
        ConfigError: `path` is not `module:name`, or there is no such thing.
    """
    module_name, separator, name = path.partition(":")
    if not separator:
        raise ConfigError(f"function={path}: write it as module:name")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"function={path}: cannot import {module_name} ({error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"function={path}: {module_name} has no function {name}")
    return function


class RewardFunction:
    """A user's function, sync or async, with its results checked."""

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.function = import_function(path)

    def __call__(
        self,
        prompts: Sequence[tuple[Message, ...]],
        completions: Sequence[str],
        columns: Sequence[dict[str, object]],
    ) -> NDArray[np.float32]:
        """[B] one reward a completion, NaN where the function answered None ("does not apply").

        Args:
            prompts: conversations up to the answer; completions: decoded answers without special tokens.
            columns: the dataset's other columns, one dict a row; the function gets them as lists by name.

        Raises:
            RewardError: it raised, or gave the wrong number or kind of values.
        """
        names = sorted(set().union(*columns)) if columns else []
        by_name = {name: [row.get(name) for row in columns] for name in names}
        try:
            rewards = self.function([list(p) for p in prompts], list(completions), **by_name)
            if inspect.isawaitable(rewards):
                rewards = asyncio.run(_wait(rewards))
        except Exception as error:
            raise RewardError(f"reward '{self.name}' raised {type(error).__name__}: {error}") from error
        return self._checked(rewards, len(completions))

    def _checked(self, rewards: object, count: int) -> NDArray[np.float32]:
        if not isinstance(rewards, Sequence | np.ndarray) or len(rewards) != count:
            found = (
                f"{len(rewards)} values"
                if isinstance(rewards, Sequence | np.ndarray)
                else type(rewards).__name__
            )
            raise RewardError(f"reward '{self.name}' returned {found} for {count} completions")
        values = []
        for reward in rewards:
            if reward is None:
                values.append(np.nan)
                continue
            try:
                value = float(reward)
            except (TypeError, ValueError) as error:
                raise RewardError(
                    f"reward '{self.name}' returned {reward!r}, not a number or None"
                ) from error
            if not np.isfinite(value):
                raise RewardError(f"reward '{self.name}' returned {value}")
            values.append(value)
        return np.asarray(values, dtype=np.float32)


async def _wait(awaitable: object) -> object:
    return await awaitable  # type: ignore[misc]
