"""Small stand-ins for what surrounds the code under test: a person, an engine, reward functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlhf_ray.config.schema import EngineSection
from rlhf_ray.engines.generation import UNKNOWN_VERSION
from rlhf_ray.engines.hf_generator import HFGenerator
from rlhf_ray.reporting.progress import QuietProgress
from rlhf_ray.types import Message, Metrics
from rlhf_ray.weights.broadcast import NamedTensors

Prompts = list[list[Message]]


class HandFedGenerator(HFGenerator):
    """The transformers engine, in the process of the trainer, with weights copied instead of sent."""

    def __init__(self, folder: Path, version: int = UNKNOWN_VERSION) -> None:
        section = EngineSection(backend="transformers", dtype="float32", max_num_seqs=32)
        super().__init__(str(folder), section, max_model_len=200, threads=1, version=version)

    def load_weights(self, weights: NamedTensors, version: int) -> None:
        self.start_weight_update()
        self._load(weights)
        self.finish_weight_update(str(version))


class Watcher(QuietProgress):
    """A person who watches a run, and does something after a number of steps."""

    def __init__(self, after: int, action: Callable[[], object]) -> None:
        self.after = after
        self.action = action

    def step(self, step: int, metrics: Metrics) -> None:
        if step == self.after:
            self.action()


class PowerCut(BaseException):
    """After which nothing else is done, as nothing would be: no handler of ours takes it for a failure."""


def cut_power() -> None:
    raise PowerCut


def num_characters(prompts: Prompts, completions: list[str], **columns: object) -> list[float]:
    return [float(len(text)) for text in completions]


def num_vowels(prompts: Prompts, completions: list[str], **columns: object) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def even_length(prompts: Prompts, completions: list[str], **columns: object) -> list[float]:
    return [float(len(text) % 2 == 0) for text in completions]


def always_one(prompts: Prompts, completions: list[str], **columns: object) -> list[float]:
    return [1.0] * len(completions)


def only_short(prompts: Prompts, completions: list[str], **columns: object) -> list[float | None]:
    """1 for an answer of at most 3 characters, nothing to say about others."""
    return [1.0 if len(text) <= 3 else None for text in completions]


def nothing_to_say(prompts: Prompts, completions: list[str], **columns: object) -> list[None]:
    return [None] * len(completions)


async def answer_is_right(prompts: Prompts, completions: list[str], answer: list[str]) -> list[float]:
    """Compares with the dataset's column `answer`."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def last_user_turn(prompts: Prompts, completions: list[str], **columns: object) -> list[float]:
    return [float(len(prompt[-1]["content"])) for prompt in prompts]


def one_too_few(prompts: Prompts, completions: list[str], **columns: object) -> list[float]:
    return [0.0] * (len(completions) - 1)


def a_single_number(prompts: Prompts, completions: list[str], **columns: object) -> float:
    return 1.0


def not_a_number(prompts: Prompts, completions: list[str], **columns: object) -> list[float]:
    return [float("nan")] * len(completions)


def words(prompts: Prompts, completions: list[str], **columns: object) -> list[str]:
    return ["good"] * len(completions)


def raises(prompts: Prompts, completions: list[str], **columns: object) -> list[float]:
    raise KeyError("gold")
