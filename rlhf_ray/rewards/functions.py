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
from rlhf_ray.rewards.source import Samples, Values, as_lists, checked
from rlhf_ray.types import Message

TextFunction = Callable[..., object]
"""`f(prompts, completions, **columns)`."""


def import_function(path: str) -> TextFunction:
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
    """A function, sync or async, with its results checked.

    Args:
        function: itself, or its import path.
    """

    def __init__(self, name: str, function: str | TextFunction) -> None:
        self.name = name
        self.function = import_function(function) if isinstance(function, str) else function

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
        return asyncio.run(self.rewards(prompts, completions, columns, in_thread=False))

    async def score(self, samples: Samples) -> Values:
        """In the event loop if the function is async, else in a thread of its own."""
        columns = samples.rollouts.columns
        return Values(await self.rewards(samples.prompts, samples.completions, columns, in_thread=True))

    async def rewards(
        self,
        prompts: Sequence[tuple[Message, ...]],
        completions: Sequence[str],
        columns: Sequence[dict[str, object]],
        in_thread: bool,
    ) -> NDArray[np.float32]:
        """As `__call__`. in_thread: a function that is not async does not hold up the event loop."""
        arguments = [list(p) for p in prompts], list(completions)
        by_name = as_lists(columns)
        try:
            if in_thread and not inspect.iscoroutinefunction(self.function):
                found = await asyncio.to_thread(self.function, *arguments, **by_name)
            else:
                found = self.function(*arguments, **by_name)
            if inspect.isawaitable(found):
                found = await found
        except Exception as error:  # the person's own code, which may raise anything
            raise RewardError(f"reward '{self.name}' raised {type(error).__name__}: {error}") from error
        return checked(self.name, found, len(completions))

    def close(self) -> None:
        pass
