"""Reward functions by import path, with TRL's signature.

`f(prompts, completions, **columns) -> list[float | None]`, sync or async.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.errors import RewardError
from rlhf_ray.import_paths import import_named
from rlhf_ray.rewards.source import Samples, Values, as_lists, checked
from rlhf_ray.types import Message

TextFunction = Callable[..., object]
"""`f(prompts, completions, **columns)`."""


def import_function(path: str) -> TextFunction:
    """
    Raises:
        ConfigError: `path` is not `module:name`, or there is no such thing.
    """
    return cast(TextFunction, import_named(path, "function", "function", callable))


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
        with self._blamed():
            found = self.function(*_arguments(prompts, completions), **as_lists(columns))
            if inspect.isawaitable(found):
                found = asyncio.run(_wait(found))
        return checked(self.name, found, len(completions))

    async def rewards(
        self,
        prompts: Sequence[tuple[Message, ...]],
        completions: Sequence[str],
        columns: Sequence[dict[str, object]],
    ) -> NDArray[np.float32]:
        """As `__call__`, in the event loop if the function is async, else in a thread of its own."""
        call = functools.partial(self.function, *_arguments(prompts, completions), **as_lists(columns))
        with self._blamed():
            is_async = inspect.iscoroutinefunction(self.function)
            found = call() if is_async else await asyncio.to_thread(call)
            if inspect.isawaitable(found):
                found = await found
        return checked(self.name, found, len(completions))

    async def score(self, samples: Samples) -> Values:
        return Values(await self.rewards(samples.prompts, samples.completions, samples.rollouts.columns))

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the person's own code, which may raise anything
            raise RewardError(f"reward '{self.name}' raised {type(error).__name__}: {error}") from error

    def close(self) -> None:
        pass


def _arguments(
    prompts: Sequence[tuple[Message, ...]], completions: Sequence[str]
) -> tuple[list[list[Message]], list[str]]:
    return [list(prompt) for prompt in prompts], list(completions)


async def _wait(awaitable: Awaitable[object]) -> object:
    return await awaitable
