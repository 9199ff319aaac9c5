"""Environments and an engine whose every word is known."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from rlhf_ray.engines.generation import Request, Sample, TokenGenerator
from rlhf_ray.environments import Answer, StepResult
from rlhf_ray.types import Message, Ragged, SamplingSpec


class ScriptedEngine(TokenGenerator):
    """Answers in turn with what it was given, under weights of version 5.

    Attributes:
        requests: one list a call.
    """

    def __init__(self, *turns: Sequence[Sample]) -> None:
        super().__init__(max_model_len=200, version=5)
        self.turns = list(turns)
        self.requests: list[list[Request]] = []

    def _sample(self, requests: Sequence[Request], sampling: SamplingSpec) -> list[Sample]:
        self.requests.append(list(requests))
        return list(self.turns[len(self.requests) - 1])

    def token_logprobs(self, sequences: Ragged) -> Ragged:
        raise NotImplementedError

    def rest(self) -> None:
        raise NotImplementedError

    def wake(self, weights_only: bool = False) -> None:
        raise NotImplementedError

    def init_weight_transfer_engine(self, init_info: dict[str, object]) -> None:
        raise NotImplementedError

    def start_weight_update(self) -> None:
        raise NotImplementedError

    def update_weights(self, update_info: dict[str, object]) -> None:
        raise NotImplementedError

    def finish_weight_update(self, weight_version: str) -> None:
        raise NotImplementedError


class Silent:
    """No turns before the first answer."""

    def reset(self, messages: Sequence[Message], columns: Mapping[str, object], seed: int) -> None:
        pass


class OneTurn(Silent):
    def step(self, answer: Answer) -> StepResult:
        return StepResult(done=True)


class Counting(Silent):
    """Says what it heard; the reward of turn n is n / 4."""

    def __init__(self, turns: int = 99, word: str = "For how long?") -> None:
        self.turns, self.word = turns, word
        self.num_answers = 0

    def step(self, answer: Answer) -> StepResult:
        self.num_answers += 1
        return StepResult(self.word, self.num_answers / 4, done=self.num_answers == self.turns)


class Vowels(Silent):
    """One for each vowel of an answer."""

    def step(self, answer: Answer) -> StepResult:
        return StepResult("more", float(sum(letter in "aeiou" for letter in answer.text)))


class Flaky(Silent):
    """As `Vowels`; it cannot bear an answer whose length is a multiple of 3."""

    def step(self, answer: Answer) -> StepResult:
        if len(answer.text) % 3 == 0:
            raise ValueError("three")
        return StepResult("more", float(sum(letter in "aeiou" for letter in answer.text)))


class Seeded:
    """Begins with a number that the seed decides."""

    def reset(self, messages: Sequence[Message], columns: Mapping[str, object], seed: int) -> str:
        self.seed = seed
        return f"{seed % 1000}"

    def step(self, answer: Answer) -> StepResult:
        return StepResult(f"{self.seed % 7}")


class Greeting:
    def __init__(self, text: str) -> None:
        self.text = text

    def reset(self, messages: Sequence[Message], columns: Mapping[str, object], seed: int) -> str:
        return self.text

    def step(self, answer: Answer) -> StepResult:
        return StepResult(done=True)


class Broken:
    """Does what the column `fault` says, at the second answer (or at the beginning)."""

    def reset(self, messages: Sequence[Message], columns: Mapping[str, object], seed: int) -> None:
        self.fault = columns.get("fault")
        self.num_answers = 0
        if self.fault == "reset":
            raise RuntimeError("no room")

    def step(self, answer: Answer) -> StepResult:
        self.num_answers += 1
        if self.num_answers < 2 or self.fault in (None, "reset"):
            return StepResult("go on", 1.0, done=self.num_answers == 2)
        if self.fault == "raise":
            raise KeyError("gold")
        if self.fault == "hang":
            threading.Event().wait()
        wrong = {
            "no result": "well done",
            "no observation": StepResult(None, 1.0),
            "nan": StepResult("go on", float("nan")),
            "role": StepResult([{"role": "assistant", "content": "me"}]),
        }
        return wrong[str(self.fault)]  # type: ignore[return-value]
