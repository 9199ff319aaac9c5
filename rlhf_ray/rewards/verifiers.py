"""Rewards that are computed from text alone: functions with TRL's signature, made from their sections."""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Sequence

import numpy as np

from rlhf_ray.config.schema import (
    ExactMatchReward,
    FormatReward,
    LengthReward,
    MathReward,
    ReasoningGymReward,
    RegexReward,
    TextVerifier,
)
from rlhf_ray.data.reasoning_gym import Task, make_task
from rlhf_ray.rewards.functions import TextFunction
from rlhf_ray.rewards.source import Samples, Values

Texts = Sequence[str]
Rewards = list[float | None]
SECONDS_AN_ANSWER = 5


def text_verifier(section: TextVerifier) -> TextFunction:
    makers: dict[str, Callable[..., TextFunction]] = {
        "exact_match": _exact_match,
        "math": _math,
        "reasoning_gym": _reasoning_gym,
        "regex": _regex,
        "format": _format,
    }
    return makers[section.type](section)


def answer_in(completion: str, extract: str | None) -> str | None:
    """The answer that a completion gives, spaces around it left out; None where it gives none.

    The last match counts: a model that reasons may change its mind.
    """
    if extract is None:
        return completion.strip()
    found = re.findall(extract, completion)
    return found[-1].strip() if found else None


def _exact_match(section: ExactMatchReward) -> TextFunction:
    def score(prompts: object, completions: Texts, **columns: Sequence[object]) -> Rewards:
        return [
            None if right is None else float(same(answer_in(completion, section.extract), str(right).strip()))
            for completion, right in zip(completions, columns[section.column], strict=True)
        ]

    def same(answer: str | None, right: str) -> bool:
        if answer is not None and section.ignore_case:
            return answer.casefold() == right.casefold()
        return answer == right

    return score


def _math(section: MathReward) -> TextFunction:
    def score(prompts: object, completions: Texts, **columns: Sequence[object]) -> Rewards:
        return [
            None
            if right is None
            else equal_as_mathematics(answer_in(completion, section.extract), str(right))
            for completion, right in zip(completions, columns[section.column], strict=True)
        ]

    return score


def equal_as_mathematics(answer: str | None, right: str) -> float | None:
    """1 or 0; 0 too where it takes more than some seconds; None where the right answer cannot be read."""
    from math_verify import parse, verify

    # math-verify's own timeouts are signals, which only a main thread may set; 0 means none.
    is_main = threading.current_thread() is threading.main_thread()
    seconds = SECONDS_AN_ANSWER if is_main else 0
    # Of bare LaTeX, 2\sqrt{2} say, it would only read the first number.
    is_bare = "\\" in right and not any(mark in right for mark in ("$", "\\(", "\\[", "\\boxed"))
    gold = parse(f"${right}$" if is_bare else right, parsing_timeout=seconds)
    if not gold:
        return None
    found = parse(answer or "", parsing_timeout=seconds)
    return float(verify(gold, found, timeout_seconds=seconds))


def _reasoning_gym(section: ReasoningGymReward) -> TextFunction:
    @functools.cache
    def task(name: str, options: str) -> Task:
        return make_task(name, json.loads(options))

    def score_of(completion: str, entry: dict[str, object], options: object) -> float:
        answer = answer_in(completion, section.extract)
        metadata = entry["metadata"]
        assert isinstance(metadata, dict)
        dataset = task(str(metadata["source_dataset"]), json.dumps(options, sort_keys=True))
        try:
            found = float(dataset.score_answer(answer, entry))
        except Exception:  # several scorers raise, each its own, on answers that they cannot read
            return 0.0
        return found if section.threshold is None else float(found >= section.threshold)

    def score(
        prompts: object, completions: Texts, entry: Sequence[dict[str, object] | None], **columns: Texts
    ) -> Rewards:
        return [
            None if row is None else score_of(completion, row, options)
            for completion, row, options in zip(completions, entry, columns["task_options"], strict=True)
        ]

    return score


def _regex(section: RegexReward) -> TextFunction:
    def score(prompts: object, completions: Texts, **columns: Sequence[object]) -> Rewards:
        patterns = columns[section.column] if section.column else [section.pattern] * len(completions)
        return [
            None if pattern is None else float(re.search(str(pattern), completion) is not None)
            for completion, pattern in zip(completions, patterns, strict=True)
        ]

    return score


def _format(section: FormatReward) -> TextFunction:
    pattern = re.compile(section.pattern, re.DOTALL)

    def score(prompts: object, completions: Texts, **columns: object) -> Rewards:
        return [float(pattern.fullmatch(completion) is not None) for completion in completions]

    return score


class LengthSource:
    """Counts the sampled tokens, which no other source sees as numbers."""

    def __init__(self, section: LengthReward) -> None:
        self.section = section

    async def score(self, samples: Samples) -> Values:
        section, lengths = self.section, samples.rollouts.responses.lengths
        if section.target is not None:
            rewards = -np.abs(lengths - section.target) / section.target
        else:
            assert section.max_tokens is not None
            rewards = (section.max_tokens - lengths) / (section.buffer or section.max_tokens)
        return Values(np.clip(rewards, -1.0, 0.0).astype(np.float32))

    def close(self) -> None:
        pass
