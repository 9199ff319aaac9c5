"""A game for trying things out: guess a number from hints. `configs/guess.yaml` trains on it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rlhf_ray.environments.interface import Answer, StepResult
from rlhf_ray.types import Message

CONSISTENT_REWARD = 0.1


class NumberGuessing:
    """The dataset's column `secret` holds the number; every wrong guess is answered by `Higher.` or `Lower.`

    A guess is an answer with exactly one number in it. One that all hints so far allow earns 0.1, and the
    right one 1 / (number of guesses) more; anything else earns nothing, and counts as a guess.
    """

    def __init__(self, low: int = 1, high: int = 10) -> None:
        self._low, self._high = low, high
        self._num_guesses = 0
        self._secret = low

    def reset(self, messages: Sequence[Message], columns: Mapping[str, object], seed: int) -> None:
        """
        Raises:
            ValueError: `secret` is missing, or no whole number in range.
        """
        secret = columns.get("secret")
        if not isinstance(secret, int) or not self._low <= secret <= self._high:
            raise ValueError(f"the column 'secret' is {secret!r}, not from {self._low} to {self._high}")
        self._secret = secret

    def step(self, answer: Answer) -> StepResult:
        self._num_guesses += 1
        found = re.findall(r"-?\d+", answer.text)
        if len(found) != 1:
            return StepResult("Answer with one number.", 0.0)
        guess = int(found[0])
        reward = CONSISTENT_REWARD if self._low <= guess <= self._high else 0.0
        if guess == self._secret:
            return StepResult(reward=reward + 1 / self._num_guesses, done=True)
        if guess < self._secret:
            self._low = max(self._low, guess + 1)
            return StepResult("Higher.", reward)
        self._high = min(self._high, guess - 1)
        return StepResult("Lower.", reward)
