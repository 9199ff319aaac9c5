"""Episodes under way, as token ids: what was sampled stays as it is, and what follows is appended to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf_ray.engines.generation import Request, Sample, sample_seed
from rlhf_ray.environments.interface import Environment
from rlhf_ray.types import Message, Prompts, Ragged, Rollouts


@dataclass
class Episode:
    """One sample of a prompt.

    Fields:
        row: of the prompt. messages, prompt: up to the first answer, as turns and as token ids.
        token_ids, logprobs, versions, is_sampled, turn_rewards: one entry a token after the prompt, as in
            `Rollouts`.
        finished: whether an EOS token ended the last answer, and there was room for what came after it.
        environment: None until it has begun, and where it could not.
        failure: how the environment failed.
        num_turns: answers so far. answer_start: position of the last one in `token_ids`.
        is_over: no answer follows.
    """

    row: int
    prompt_id: int
    sample_id: int
    messages: tuple[Message, ...]
    prompt: list[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    is_sampled: list[bool] = field(default_factory=list)
    turn_rewards: list[float] = field(default_factory=list)
    finished: bool = False
    environment: Environment | None = None
    failure: str | None = None
    num_turns: int = 0
    answer_start: int = 0
    is_over: bool = False

    @property
    def answer_ids(self) -> list[int]:
        return self.token_ids[self.answer_start :]

    def request(self, seed: int) -> Request:
        """For the next answer; the first is that of a generation without an environment."""
        later = (self.num_turns,) if self.num_turns else ()
        own_seed = sample_seed(seed, self.prompt_id, self.sample_id, *later)
        return Request(self.prompt_id, self.sample_id, (*self.prompt, *self.token_ids), own_seed)

    def add_answer(self, sample: Sample) -> None:
        self.answer_start = len(self.token_ids)
        self.num_turns += 1
        self._extend([int(token) for token in sample.token_ids], is_sampled=True)
        self.logprobs += [float(logprob) for logprob in sample.logprobs]
        self.versions += list(sample.versions)
        self.finished = sample.finished

    def add_observation(self, token_ids: Sequence[int]) -> None:
        self._extend(token_ids, is_sampled=False)
        self.logprobs += [0.0] * len(token_ids)
        self.versions += [self.versions[-1]] * len(token_ids)

    def add_reward(self, reward: float) -> None:
        """For the last answer, at its last token."""
        self.turn_rewards[-1] = reward

    def fail(self, reason: str) -> None:
        self.failure = reason
        self.is_over = True

    def _extend(self, token_ids: Sequence[int], is_sampled: bool) -> None:
        self.token_ids += token_ids
        self.is_sampled += [is_sampled] * len(token_ids)
        self.turn_rewards += [0.0] * len(token_ids)


def episode_rollouts(prompts: Prompts, episodes: Sequence[Episode]) -> Rollouts:
    return Rollouts(
        prompt_ids=np.array([episode.prompt_id for episode in episodes], dtype=np.int64),
        sample_ids=np.array([episode.sample_id for episode in episodes], dtype=np.int64),
        prompts=Ragged.from_rows([episode.prompt for episode in episodes], np.int32),
        responses=Ragged.from_rows([episode.token_ids for episode in episodes], np.int32),
        logprobs=Ragged.from_rows([episode.logprobs for episode in episodes], np.float32),
        versions=Ragged.from_rows([episode.versions for episode in episodes], np.int32),
        is_sampled=Ragged.from_rows([episode.is_sampled for episode in episodes], np.bool_),
        turn_rewards=Ragged.from_rows([episode.turn_rewards for episode in episodes], np.float32),
        finished=np.array([episode.finished for episode in episodes], dtype=np.bool_),
        failures=tuple(episode.failure for episode in episodes),
        columns=tuple(prompts.columns[episode.row] for episode in episodes),
        messages=tuple(episode.messages for episode in episodes),
    )
