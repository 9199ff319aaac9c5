"""Prompts and rollouts, made by hand or at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.encoding import encode_prompts
from rlhf_ray.data.formats import PromptExample
from rlhf_ray.rewards.source import Samples
from rlhf_ray.types import Prompts, Ragged, Rollouts
from tests.tiny import tiny_tokenizer


def rollouts_of(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    finished: Sequence[bool] | None = None,
    prompt_ids: Sequence[int] | None = None,
    version: int = 0,
    columns: Sequence[dict[str, object]] | None = None,
) -> Rollouts:
    """Rollouts of given tokens; the sampler's log-probs are -1 everywhere."""
    answers = Ragged.from_rows(responses, np.int32)
    count = len(responses)
    ids = np.asarray(range(count) if prompt_ids is None else prompt_ids, dtype=np.int64)
    return Rollouts(
        prompt_ids=ids,
        sample_ids=np.arange(count, dtype=np.int64),
        prompts=Ragged.from_rows(prompts, np.int32),
        responses=answers,
        logprobs=answers.with_values(np.full(len(answers.values), -1.0, dtype=np.float32)),
        versions=answers.with_values(np.full(len(answers.values), version, dtype=np.int32)),
        is_sampled=answers.with_values(np.ones(len(answers.values), dtype=np.bool_)),
        turn_rewards=answers.with_values(np.zeros(len(answers.values), dtype=np.float32)),
        finished=np.asarray([True] * count if finished is None else finished, dtype=np.bool_),
        failures=(None,) * count,
        columns=tuple(columns or [{} for _ in range(count)]),
        messages=tuple(({"role": "user", "content": f"question {prompt}"},) for prompt in ids),
    )


def samples_of(*texts: str, **columns: list[object]) -> Samples:
    """Given answers, whatever their tokens."""
    rows = [{name: column[row] for name, column in columns.items()} for row in range(len(texts))]
    return Samples(tuple(texts), rollouts_of([[1, 30]] * len(texts), [[40, 2]] * len(texts), columns=rows))


def prompts_of(*texts: str) -> Prompts:
    """Prompts with the ids 0, 1, …, rendered as the chat template does it."""
    formatter = ChatFormatter(tiny_tokenizer(), (2,))
    examples = [PromptExample(i, ({"role": "user", "content": text},), {}) for i, text in enumerate(texts)]
    prompts, _ = encode_prompts(examples, formatter, max_prompt_length=100)
    return prompts


def random_rollouts(lengths: Sequence[tuple[int, int]], seed: int = 0) -> Rollouts:
    """Of (prompt, response) lengths; every response ends in EOS, which is also the pad token."""
    generator = np.random.default_rng(seed)
    return rollouts_of(
        [generator.integers(3, 290, prompt) for prompt, _ in lengths],
        [np.append(generator.integers(3, 290, response - 1), 2) for _, response in lengths],
    )
