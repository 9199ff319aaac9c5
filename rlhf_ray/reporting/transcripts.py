"""Responses as text, where they hold more than one answer."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rlhf_ray.types import Rollouts

Span = tuple[int, int, bool]
"""Start, end, and whether it was sampled."""


def spans(is_sampled: NDArray[np.bool_]) -> list[Span]:
    """Answers and observations of one response, in turn."""
    changes = np.flatnonzero(np.diff(is_sampled)) + 1
    edges = [0, *changes.tolist(), len(is_sampled)]
    return [(start, end, bool(is_sampled[start])) for start, end in pairwise(edges)]


def answer_texts(rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """[B] what the policy said, without special tokens; the answers of an episode on lines of their own."""
    return [
        "\n".join(text for text, is_answer in parts if is_answer) for parts in _texts(rollouts, tokenizer)
    ]


def transcripts(rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """[B] as `answer_texts`, with what the environment said in between, marked by `> ` at each line."""
    return [
        "\n".join(text if is_answer else _quoted(text) for text, is_answer in parts)
        for parts in _texts(rollouts, tokenizer)
    ]


def _texts(rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase) -> list[list[tuple[str, bool]]]:
    found = []
    for row, is_sampled in zip(rollouts.responses, rollouts.is_sampled, strict=True):
        parts = spans(is_sampled)  # type: ignore[arg-type]
        ids = [row[start:end].tolist() for start, end, _ in parts]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        found.append([(text, is_answer) for text, (_, _, is_answer) in zip(texts, parts, strict=True)])
    return found


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.strip().splitlines())
