"""Trained reward models as sources, alone or several together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.schema import EnsembleReward, ModelSection
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.errors import DataError, RewardError
from rlhf_ray.models.loading import eos_token_ids, load_tokenizer, reads_alike
from rlhf_ray.rewards.source import Samples, Values
from rlhf_ray.types import Ragged


class TokenScorer(Protocol):
    """A reward model, wherever it runs. max_length: tokens of a row that it takes; None for any."""

    @property
    def max_length(self) -> int | None: ...

    def scores(self, sequences: Ragged) -> NDArray[np.float32]:
        """[B] of each row's last token."""
        ...

    def rest(self) -> None: ...

    def wake(self) -> None: ...


class ModelSource:
    """One reward model.

    Args:
        section: names the model. policy: its formatter wrote the prompts that were sampled from.
        turn: held while the device is in use; models on one device work in sequence.
    """

    def __init__(
        self, name: str, section: ModelSection, policy: ModelSection, model: TokenScorer, turn: asyncio.Lock
    ) -> None:
        self.name = name
        self.turn = turn
        self.model = model
        policy_tokenizer, tokenizer = load_tokenizer(policy), load_tokenizer(section)
        self.reads_sampled_ids = reads_alike(policy_tokenizer, tokenizer)
        # With the policy's ids, what ends an answer is the policy's matter: its formatter wrote the pairs
        # that the reward model was trained on.
        reader = (policy, policy_tokenizer) if self.reads_sampled_ids else (section, tokenizer)
        self.formatter = ChatFormatter(reader[1], eos_token_ids(*reader))

    async def score(self, samples: Samples) -> Values:
        async with self.turn:
            return Values(await asyncio.to_thread(self._scores, samples))

    def _scores(self, samples: Samples) -> NDArray[np.float32]:
        sequences = self._sampled(samples) if self.reads_sampled_ids else self._rendered(samples)
        limit = self.model.max_length
        if limit is not None and (sequences.lengths > limit).any():
            row = int(np.argmax(sequences.lengths))
            raise RewardError(
                f"reward '{self.name}': {_sample(samples, row)} has {sequences.lengths[row]} tokens with its "
                f"prompt, and {limit} fit into the engine; use placement.reward.backend: torch"
            )
        scores = self.model.scores(sequences)
        if not np.isfinite(scores).all():
            row = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise RewardError(
                f"reward '{self.name}': the model's score of {_sample(samples, row)} is {scores[row]}"
            )
        return scores

    def _sampled(self, samples: Samples) -> Ragged:
        """The very ids that were sampled.

        The reward model has only seen answers that end in EOS, so one that the length limit cut gets it too;
        being cut is punished apart (missing_eos_penalty).
        """
        rollouts, formatter = samples.rollouts, self.formatter
        ended = [
            r if finished or r[-1] in formatter.eos_token_ids else np.append(r, formatter.eos_token_id)
            for r, finished in zip(rollouts.responses, rollouts.finished, strict=True)
        ]
        return Ragged.join(rollouts.prompts, Ragged.from_rows(ended, np.int32))

    def _rendered(self, samples: Samples) -> Ragged:
        """Conversation and decoded answer by the reward model's own tokenizer and template."""
        rows = []
        for row, (messages, text) in enumerate(zip(samples.prompts, samples.completions, strict=True)):
            try:
                prompt = self.formatter.prompt_ids(messages)
            except DataError as error:
                raise RewardError(f"reward '{self.name}': {_sample(samples, row)}: {error}") from error
            rows.append(prompt + self.formatter.completion_ids(text))
        return Ragged.from_rows(rows, np.int32)

    def close(self) -> None:
        pass


class EnsembleSource:
    """Several reward models (Coste et al. 2023, "Reward model ensembles help mitigate overoptimization").

    Mean, or, pessimistically, mean - spread_coef * standard deviation over the members (population).
    """

    def __init__(self, section: EnsembleReward, members: Sequence[ModelSource]) -> None:
        self.section = section
        self.members = members

    async def score(self, samples: Samples) -> Values:
        scores = np.stack([(await member.score(samples)).rewards for member in self.members])
        spread = scores.std(axis=0, dtype=np.float64)
        rewards = scores.mean(axis=0, dtype=np.float64)
        if self.section.aggregate == "pessimistic":
            rewards = rewards - self.section.spread_coef * spread
        return Values(rewards.astype(np.float32), spread.astype(np.float32))

    def close(self) -> None:
        pass


def _sample(samples: Samples, row: int) -> str:
    rollouts = samples.rollouts
    return f"sample {rollouts.sample_ids[row]} of prompt {rollouts.prompt_ids[row]}"
