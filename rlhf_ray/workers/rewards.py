"""All reward sources of a stage, in the reward actor; and the judge, in an actor of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import SecretStr

from rlhf_ray.config.schema import (
    EngineSection,
    EnsembleReward,
    FunctionReward,
    HttpReward,
    JudgeReward,
    LengthReward,
    ModelReward,
    ModelSection,
    Reward,
    TextVerifier,
    TrainingSection,
)
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.engines.deepspeed_engine import World, leave_world
from rlhf_ray.engines.generation import TokenGenerator
from rlhf_ray.models.loading import eos_token_ids, load_tokenizer, max_model_length
from rlhf_ray.reporting.transcripts import answer_texts
from rlhf_ray.rewards.child import ChildFunction
from rlhf_ray.rewards.failures import GuardedSource, Outcome, all_of
from rlhf_ray.rewards.functions import RewardFunction
from rlhf_ray.rewards.judge import JudgeSource
from rlhf_ray.rewards.models import EnsembleSource, ModelSource, TokenScorer
from rlhf_ray.rewards.remote import HttpSource
from rlhf_ray.rewards.source import RewardSource, Samples, Values
from rlhf_ray.rewards.verifiers import LengthSource, text_verifier
from rlhf_ray.types import Metrics, Rollouts, Scores
from rlhf_ray.workers.frozen import FrozenScores
from rlhf_ray.workers.served import RewardEngine

Judged = Mapping[str, Outcome]
"""Name of a judge -> what it said."""


class _Sources:
    """Guarded sources that are asked about the same samples at the same time, in one event loop."""

    def __init__(self, policy: ModelSection) -> None:
        self.tokenizer = load_tokenizer(policy)
        self.sources: dict[str, GuardedSource] = {}
        # One loop for all calls: what an async function keeps open lives on.
        self.runner = asyncio.Runner()

    def ask(self, rollouts: Rollouts) -> dict[str, Outcome]:
        samples = Samples(tuple(answer_texts(rollouts, self.tokenizer)), rollouts)
        outcomes = self.runner.run(all_of(source.score(samples) for source in self.sources.values()))
        return dict(zip(self.sources, outcomes, strict=True))

    def close(self) -> None:
        for guarded in self.sources.values():
            guarded.source.close()
        self.runner.close()


class RewardWorker(_Sources):
    """Every source but the judges, and the weighted sum of all.

    Args:
        sources: each with the reward models of those that have some.
        tokens: name of a source -> bearer token.
        has_environment: whether the rollouts bring the rewards of an environment, which count with weight 1.
        world: of ranks that hold a part of each reward model; None where this process has all of them. What
            has no model is the first rank's affair, whose scores count.
        engine: that serves the reward model, of which there is one then.
    """

    def __init__(
        self,
        policy: ModelSection,
        sources: Sequence[tuple[Reward, tuple[ModelSection, ...]]],
        training: TrainingSection,
        device: torch.device,
        threads: int,
        tokens: Mapping[str, SecretStr],
        has_environment: bool = False,
        world: World | None = None,
        engine: RewardEngine | None = None,
    ) -> None:
        super().__init__(policy)
        self.has_environment = has_environment
        torch.set_num_threads(threads)
        self.world = world
        if world is not None and world.rank > 0:
            sources = [(section, models) for section, models in sources if models]
        self.sections = [section for section, _ in sources]
        self.models: list[ModelSource] = []
        turn = asyncio.Lock()

        def scorer(model: ModelSection) -> TokenScorer:
            if engine is not None:
                return engine.start(model, policy, threads)
            return FrozenScores(model, training, device, world)

        for section, models in sources:
            members = [ModelSource(section.name, m, policy, scorer(m), turn) for m in models]
            self.models += members
            if not isinstance(section, JudgeReward):
                source = _source(section, members, tokens.get(section.name))
                size = section.batch_size if isinstance(section, HttpReward) else None
                # Models say the same again; and ranks must ask theirs equally often, in the same order.
                self.sources[section.name] = GuardedSource(section, source, size, repeats=not models)

    def score(self, rollouts: Rollouts, judged: Judged | None = None) -> Scores:
        """
        Args:
            judged: what the judges say of the same rollouts.

        Raises:
            RewardError: a source failed whose failures are not to be masked.
            ConfigError: a server refuses to be asked.
        """
        outcomes = {**self.ask(rollouts), **(judged or {})}
        trained = [section for section in self.sections if section.weight]
        rewards = {section.name: outcomes[section.name].values.rewards for section in self.sections}
        # NaN stands for "does not apply": it adds nothing to the total.
        total = np.zeros(len(rollouts), dtype=np.float64)
        failed = np.zeros(len(rollouts), dtype=np.bool_)
        for section in trained:
            total += section.weight * np.nan_to_num(rewards[section.name])
            failed |= outcomes[section.name].failed
        if self.has_environment:
            rewards["environment"] = environment_rewards(rollouts)
            total += rewards["environment"]
        return Scores(
            total=total.astype(np.float32),
            parts=rewards,
            is_valid=~failed,
            spreads={
                section.name: _spread(outcomes[section.name].values)
                for section in self.sections
                if isinstance(section, EnsembleReward)
            },
            events=self._events(outcomes),
        )

    def rest(self) -> None:
        for member in self.models:
            member.model.rest()

    def wake(self, weights_only: bool = False) -> None:
        for member in self.models:
            member.model.wake()

    def close(self) -> None:
        super().close()
        if self.world is not None:
            leave_world()

    def _events(self, outcomes: Mapping[str, Outcome]) -> Metrics:
        """Samples that a source failed on, and calls that were repeated; of sources that may survive that."""
        events: Metrics = {}
        for section in self.sections:
            if section.on_error != "raise":
                outcome = outcomes[section.name]
                events[f"reward/{section.name}/failures"] = float(outcome.failed.sum())
                events[f"reward/{section.name}/retries"] = float(outcome.num_retries)
        return events


def environment_rewards(rollouts: Rollouts) -> NDArray[np.float32]:
    """[B] sum over the turns."""
    turns = rollouts.turn_rewards
    return np.bincount(turns.row_ids, weights=turns.values, minlength=len(turns)).astype(np.float32)


def _spread(values: Values) -> NDArray[np.float32]:
    """NaN where the ensemble failed."""
    return np.full_like(values.rewards, np.nan) if values.spread is None else values.spread


def _source(section: Reward, models: Sequence[ModelSource], token: SecretStr | None) -> RewardSource:
    match section:
        case ModelReward():
            return models[0]
        case EnsembleReward():
            return EnsembleSource(section, models)
        case HttpReward():
            return HttpSource(section, token)
        case LengthReward():
            return LengthSource(section)
        case JudgeReward():
            raise AssertionError("a judge lives in an actor of its own")
        case FunctionReward():
            function: str | TextVerifier = section.function
        case _:
            function = section
    if section.timeout is not None:
        return ChildFunction(section.name, function, section.timeout)
    return RewardFunction(section.name, function if isinstance(function, str) else text_verifier(function))


class JudgeWorker(_Sources):
    """All judges of a stage, on one engine.

    Args:
        sections: with the templates themselves, not their files' names.
        policy: whose tokens the rollouts are. model: that judges. sleeps: as in `VLLMGenerator`.
    """

    def __init__(
        self,
        sections: Sequence[JudgeReward],
        policy: ModelSection,
        model: ModelSection,
        engine: EngineSection,
        threads: int,
        sleeps: bool = False,
    ) -> None:
        super().__init__(policy)
        tokenizer = load_tokenizer(model)
        formatter = ChatFormatter(tokenizer, eos_token_ids(model, tokenizer))
        room = min(max(section.max_length for section in sections), max_model_length(model))
        self.engine = _engine(model, engine, room, threads, sleeps)
        for section in sections:
            # vLLM samples one token after those that it is asked about.
            length = min(section.max_length, room - 1)
            judge = JudgeSource(section, self.engine.token_logprobs, formatter, tokenizer, length)
            self.sources[section.name] = GuardedSource(section, judge)

    def score(self, rollouts: Rollouts) -> Judged:
        """
        Raises:
            RewardError: a judge failed whose failures are not to be masked.
        """
        return self.ask(rollouts)

    def rest(self) -> None:
        self.engine.rest()

    def wake(self, weights_only: bool = False) -> None:
        self.engine.wake(weights_only)


def _engine(
    model: ModelSection, section: EngineSection, max_model_len: int, threads: int, sleeps: bool
) -> TokenGenerator:
    # Each brings in its own heavy library.
    if section.backend == "vllm":
        from rlhf_ray.engines.vllm_generator import VLLMGenerator

        return VLLMGenerator(
            model.path, section, max_model_len, threads=threads, seed=0, version=0, sleeps=sleeps
        )
    from rlhf_ray.engines.hf_generator import HFGenerator

    return HFGenerator(model.path, section, max_model_len, threads=threads, version=0)
