"""What can be told of a reward source without running it: files, functions, columns, tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_ray.config.document import nearest
from rlhf_ray.config.model_checks import model_mistakes, path_mistakes
from rlhf_ray.config.schema import (
    EnsembleReward,
    ExactMatchReward,
    HttpReward,
    JudgeReward,
    MathReward,
    ModelReward,
    ModelSection,
    ReasoningGymReward,
    RegexReward,
    Reward,
)

KeyMistake = tuple[tuple[str | int, ...], str]
"""Key path within the source, and what is wrong with its value."""


def reward_mistakes(reward: Reward, columns: Sequence[str] | None) -> Iterator[KeyMistake]:
    """
    Args:
        columns: of the dataset of prompts; None where they are not known.
    """
    match reward:
        case ModelReward() if reward.path is not None:
            yield from _reward_model(("path",), reward.path, reward.chat_template)
        case EnsembleReward():
            for number, path in enumerate(reward.paths):
                yield from _reward_model(("paths", number), path, reward.chat_template)
        case HttpReward() if reward.token_env is not None and not os.environ.get(reward.token_env):
            yield ("token_env",), "the environment variable is not set; export it with the server's token"
        case JudgeReward():
            yield from _judge(reward)
        case ExactMatchReward() | MathReward() | RegexReward() if reward.column is not None:
            yield from _column(reward.column, columns)
        case ReasoningGymReward() if columns is not None and "entry" not in columns:
            yield (
                (),
                "scores answers to questions of reasoning_gym only; use a dataset with "
                "path: reasoning_gym:TASK, or another reward",
            )


def _reward_model(key: tuple[str | int, ...], path: str, template: str | None) -> Iterator[KeyMistake]:
    for sentence in path_mistakes(path, "reward", has_template=template is not None):
        yield key, sentence
    yield from _template_of_model(template)


def _template_of_model(template: str | None) -> Iterator[KeyMistake]:
    # The embedded model stands for any: only its template is asked about.
    for key, sentence in model_mistakes(ModelSection(chat_template=template), "language"):
        if key == "chat_template":
            yield (key,), sentence


def _judge(judge: JudgeReward) -> Iterator[KeyMistake]:
    if judge.path is not None:
        for sentence in path_mistakes(judge.path, "language", has_template=judge.chat_template is not None):
            yield ("path",), sentence
    yield from _template_of_model(judge.chat_template)
    if judge.is_inline:
        return
    try:
        text = Path(judge.template).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError):
        yield ("template",), "is neither text with {completion} in it nor a file that can be read"
        return
    if "{completion}" not in text:
        yield ("template",), "the file has no {completion}, where the answer is to stand"


def _column(column: str, columns: Sequence[str] | None) -> Iterator[KeyMistake]:
    if columns is not None and column not in columns:
        hint = nearest(column, columns) or f"; it has {', '.join(columns)}"
        yield ("column",), f"the dataset of prompts has no such column{hint}"
