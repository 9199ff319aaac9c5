"""What a user's environment looks like: text at its boundary, token ids on our side."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from rlhf_ray.errors import ConfigError, EnvironmentFailure
from rlhf_ray.import_paths import import_named
from rlhf_ray.types import Message

METHODS = ("reset", "step")


@dataclass(frozen=True)
class Answer:
    """What the policy said in one turn.

    Fields:
        text: decoded, without special tokens. token_ids: as sampled, with the EOS token that ended it.
        finished: False where the length limit cut it.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class StepResult:
    """What the environment makes of an answer.

    Fields:
        observation: the turns that follow the answer; a text is one user turn. Not looked at when done.
        reward: for this turn; None is 0.
        done: whether the episode ends here.
    """

    observation: str | Sequence[Message] | None = None
    reward: float | None = None
    done: bool = False


class Environment(Protocol):
    """One episode. A class of this form is named by `online.environment.class_path`.

    It is built with `online.environment.options` as keyword arguments, once an episode, and both methods are
    called in threads: what it shares with other episodes has to bear that.
    """

    def reset(
        self, messages: Sequence[Message], columns: Mapping[str, object], seed: int
    ) -> str | Sequence[Message] | None:
        """Begin.

        Args:
            messages: the prompt. columns: the dataset's others.
            seed: the same for all samples of a prompt in a step, so that they face the same task.

        Returns:
            Turns to append to the prompt, or None.
        """
        ...

    def step(self, answer: Answer) -> StepResult: ...


def import_environment(path: str) -> type[Environment]:
    """
    Raises:
        ConfigError: `path` is not `module:Class`, there is no such class, or it lacks a method.
    """
    found = import_named(path, "class_path", "class", inspect.isclass, form="module:Class")
    missing = [method for method in METHODS if not callable(getattr(found, method, None))]
    if missing:
        raise ConfigError(f"class_path={path}: has no method {' and no '.join(missing)}")
    return cast(type[Environment], found)


def option_mistake(environment: type[Environment], options: Mapping[str, object]) -> str | None:
    """Why the class cannot be built with these options, as far as its signature tells."""
    try:
        inspect.signature(environment).bind(**options)
    except TypeError as error:
        return str(error)
    return None


def as_turns(observation: str | Sequence[Message]) -> tuple[Message, ...]:
    """
    Raises:
        EnvironmentFailure: it is not a text, nor a list of turns of others than the assistant.
    """
    if isinstance(observation, str):
        return ({"role": "user", "content": observation},)
    turns = tuple(observation)
    for turn in turns:
        is_turn = isinstance(turn, dict) and all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        )
        if not is_turn or turn["role"] == "assistant":
            raise EnvironmentFailure(f"observation {turn!r}: not a turn of the user, a tool or the system")
    if not turns:
        raise EnvironmentFailure("observation []: has no turns, and the episode is not done")
    return turns


def checked_reward(result: StepResult) -> float:
    """
    Raises:
        EnvironmentFailure: the reward is no finite number.
    """
    if result.reward is None:
        return 0.0
    try:
        reward = float(result.reward)
    except (TypeError, ValueError) as error:
        raise EnvironmentFailure(f"reward {result.reward!r}: not a number or None") from error
    if not math.isfinite(reward):
        raise EnvironmentFailure(f"reward {reward}")
    return reward
