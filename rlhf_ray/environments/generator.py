"""An engine and environments take turns: all episodes answer together, then all environments reply."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.schema import EnvironmentSection, ModelSection
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.engines.generation import TokenGenerator
from rlhf_ray.environments.calls import call_all
from rlhf_ray.environments.episodes import Episode, episode_rollouts
from rlhf_ray.environments.interface import (
    Answer,
    Environment,
    StepResult,
    as_turns,
    checked_reward,
    import_environment,
)
from rlhf_ray.errors import DataError, EnvironmentFailure
from rlhf_ray.models.loading import eos_token_ids, load_tokenizer
from rlhf_ray.seeds import derive_seed
from rlhf_ray.types import Message, Prompts, Ragged, Rollouts, SamplingSpec

T = TypeVar("T")


@dataclass(frozen=True)
class _Reply:
    """Fields: turns: what follows the answer; none where the episode is done."""

    turns: tuple[Message, ...]
    reward: float


class EnvironmentGenerator:
    """Plays the part of an engine: `generate` plays whole episodes, the rest is the engine's own."""

    def __init__(
        self,
        engine: TokenGenerator,
        tokenizer: PreTrainedTokenizerBase,
        formatter: ChatFormatter,
        section: EnvironmentSection,
        max_prompt_length: int,
    ) -> None:
        """
        Args:
            max_prompt_length: of the prompt with what an environment appends when it begins.

        Raises:
            ConfigError: the environment's class cannot be imported.
            ModelError: the chat template cannot continue a conversation (`ChatFormatter.check_continues`).
        """
        formatter.check_continues()
        self._engine = engine
        self._tokenizer = tokenizer
        self._formatter = formatter
        self._section = section
        self._max_prompt_length = max_prompt_length
        self._class = import_environment(section.class_path)

    def generate(self, prompts: Prompts, sampling: SamplingSpec, seed: int) -> Rollouts:
        """Episodes in the order of prompts, then samples. Equal seeds give equal episodes, as far as the
        environments depend on nothing but theirs.

        `sampling.max_completion_length` is that of one turn. An episode ends when its environment says so,
        after `max_turns`, or where another turn might not fit into `max_episode_length`.

        Raises: as `TokenGenerator.generate`. An environment that fails ends its own episode only.
        """
        episodes = [
            Episode(row, int(prompt_id), sample_id, prompts.messages[row], prompts.token_ids[row].tolist())
            for row, prompt_id in enumerate(prompts.ids)
            for sample_id in range(sampling.num_generations)
        ]
        self._begin(episodes, prompts, seed)
        while playing := [episode for episode in episodes if not episode.is_over]:
            samples = self._engine.sample([episode.request(seed) for episode in playing], sampling)
            for episode, sample in zip(playing, samples, strict=True):
                episode.add_answer(sample)
            self._reply(playing, sampling.max_completion_length)
        return episode_rollouts(prompts, episodes)

    def _begin(self, episodes: Sequence[Episode], prompts: Prompts, seed: int) -> None:
        calls = [
            partial(self._reset, e.messages, prompts.columns[e.row], derive_seed(seed, e.prompt_id))
            for e in episodes
        ]
        for episode, begun in zip(episodes, self._call_all(calls), strict=True):
            if isinstance(begun, EnvironmentFailure):
                episode.failure = f"reset: {begun}"
                continue
            episode.environment, turns = begun
            try:
                self._extend_prompt(episode, turns)
            except (DataError, EnvironmentFailure) as error:
                episode.environment, episode.failure = None, f"reset: {error}"

    def _reset(
        self, messages: Sequence[Message], columns: dict[str, object], seed: int
    ) -> tuple[Environment, tuple[Message, ...]]:
        environment = self._class(**self._section.options)
        observation = environment.reset([dict(turn) for turn in messages], dict(columns), seed)
        return environment, () if observation is None else as_turns(observation)

    def _extend_prompt(self, episode: Episode, turns: tuple[Message, ...]) -> None:
        """By turns of the environment; nothing was sampled yet, so the whole is rendered anew."""
        if not turns:
            return
        messages = (*episode.messages, *turns)
        prompt = self._formatter.prompt_ids(messages)
        if len(prompt) > self._max_prompt_length:
            raise EnvironmentFailure(
                f"with its observation the prompt has {len(prompt)} tokens, more than "
                f"online.max_prompt_length={self._max_prompt_length}"
            )
        episode.messages, episode.prompt = messages, prompt

    def _reply(self, episodes: Sequence[Episode], max_completion_length: int) -> None:
        """Let the environments judge the last answers, and append what they say."""
        judges = [(episode, episode.environment) for episode in episodes if episode.environment]
        for episode in episodes:
            # One whose environment could not begin has an answer, as every row has, and nobody to judge it.
            episode.is_over = episode.environment is None
        calls = [partial(_step, environment, self._answer(episode)) for episode, environment in judges]
        for (episode, _), reply in zip(judges, self._call_all(calls), strict=True):
            if isinstance(reply, EnvironmentFailure):
                episode.fail(f"step: {reply}")
                continue
            episode.add_reward(reply.reward)
            if not reply.turns or episode.num_turns == self._section.max_turns:
                episode.is_over = True
                continue
            try:
                self._continue(episode, reply.turns, max_completion_length)
            except DataError as error:
                episode.fail(f"step: {error}")

    def _answer(self, episode: Episode) -> Answer:
        ids = episode.answer_ids
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(str(text), tuple(ids), episode.finished)

    def _continue(self, episode: Episode, turns: tuple[Message, ...], max_completion_length: int) -> None:
        observation = self._formatter.continuation_ids(turns)
        if not episode.finished:
            # The EOS that the answer lacks; it was not sampled, and so belongs to what is appended.
            observation = [self._formatter.eos_token_id, *observation]
        needed = len(episode.token_ids) + len(observation) + max_completion_length
        if needed > self._section.max_episode_length:
            episode.finished, episode.is_over = False, True
        else:
            episode.add_observation(observation)

    def _call_all(self, calls: Sequence[Callable[[], T]]) -> list[T | EnvironmentFailure]:
        return call_all(calls, self._section.num_threads, self._section.timeout)

    def token_logprobs(self, sequences: Ragged) -> Ragged:
        return self._engine.token_logprobs(sequences)

    def rest(self) -> None:
        self._engine.rest()

    def wake(self, weights_only: bool = False) -> None:
        self._engine.wake(weights_only)

    def init_weight_transfer_engine(self, init_info: dict[str, object]) -> None:
        self._engine.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self._engine.start_weight_update()

    def update_weights(self, update_info: dict[str, object]) -> None:
        self._engine.update_weights(update_info)

    def finish_weight_update(self, weight_version: str) -> None:
        self._engine.finish_weight_update(weight_version)


def _step(environment: Environment, answer: Answer) -> _Reply:
    result = environment.step(answer)
    if not isinstance(result, StepResult):
        raise EnvironmentFailure(f"answered with {type(result).__name__}, not with a StepResult")
    reward = checked_reward(result)
    if result.done:
        return _Reply((), reward)
    if result.observation is None:
        raise EnvironmentFailure("is not done, and has no observation that could be answered")
    return _Reply(as_turns(result.observation), reward)


def build_environment_generator(
    engine: str,
    arguments: dict[str, object],
    model: ModelSection,
    section: EnvironmentSection,
    max_prompt_length: int,
) -> EnvironmentGenerator:
    """In the process of an engine.

    Args:
        engine: `module:Class` of a `TokenGenerator`. arguments: its own.
        model: whose tokenizer and chat template are used.
    """
    module, _, name = engine.partition(":")
    tokenizer = load_tokenizer(model)
    formatter = ChatFormatter(tokenizer, eos_token_ids(model, tokenizer))
    built = getattr(importlib.import_module(module), name)(**arguments)
    return EnvironmentGenerator(built, tokenizer, formatter, section, max_prompt_length)
