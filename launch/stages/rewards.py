"""Starting what rewards come from: the reward actor, and the judge where there is one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from actors.group import ActorGroup
from actors.roles import RemoteScorer
from launch.memory import engine_memory, frozen_memory, model_size
from launch.placement import Placement, RoleDemand
from launch.stages.context import StageContext
from rlhf_ray.config.schema import (
    EnsembleReward,
    HttpReward,
    JudgeReward,
    ModelReward,
    ModelSection,
    OnlineSection,
    Reward,
)
from rlhf_ray.engines.deepspeed_engine import World
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.loading import load_tokenizer, reads_alike
from rlhf_ray.workers.served import RewardEngine


@dataclass(frozen=True)
class RewardModels:
    """
    Fields:
        sources: each with its reward models, if it has some.
        judge: the model of all judges; None where there is none.
        tokens: name of a source -> bearer token.
    """

    sources: tuple[tuple[Reward, tuple[ModelSection, ...]], ...]
    judge: ModelSection | None
    tokens: dict[str, SecretStr]

    @property
    def models(self) -> list[ModelSection]:
        return [model for _, models in self.sources for model in models]

    def critic_start(self, policy: ModelSection) -> ModelSection:
        """The reward model that a critic begins as.

        Raises:
            ConfigError: it reads other tokens than the policy writes.
        """
        first = self.models[0]
        if not reads_alike(load_tokenizer(policy), load_tokenizer(first)):
            raise ConfigError(
                "online.critic_init=reward: the reward model has another tokenizer or chat template than the "
                "policy, whose tokens a critic reads; use critic_init: policy"
            )
        return first

    @property
    def judges(self) -> list[JudgeReward]:
        return [section for section, _ in self.sources if isinstance(section, JudgeReward)]


def find_rewards(context: StageContext, section: OnlineSection, policy: ModelSection) -> RewardModels:
    """
    Raises:
        ConfigError: a reward model, a token or a template is not there.
    """
    return RewardModels(
        sources=tuple((_with_template(r), _models_of(context, r)) for r in section.rewards),
        judge=_judge_model(context, section, policy),
        tokens={
            reward.name: _token(reward.token_env)
            for reward in section.rewards
            if isinstance(reward, HttpReward) and reward.token_env is not None
        },
    )


def _models_of(context: StageContext, reward: Reward) -> tuple[ModelSection, ...]:
    if isinstance(reward, EnsembleReward):
        return tuple(
            context.model(
                f"reward:{reward.name}[{number}]", ModelSection(path=path, chat_template=reward.chat_template)
            )
            for number, path in enumerate(reward.paths)
        )
    if not isinstance(reward, ModelReward):
        return ()
    if reward.path:
        named: ModelSection | None = ModelSection(path=reward.path, chat_template=reward.chat_template)
    else:
        named = context.artefacts.reward_model
    if named is None:
        raise ConfigError(f"online.rewards: '{reward.name}' names no path, and no reward stage came before")
    return (context.model(f"reward:{reward.name}", named),)


def _judge_model(context: StageContext, section: OnlineSection, policy: ModelSection) -> ModelSection | None:
    judge = next((reward for reward in section.rewards if isinstance(reward, JudgeReward)), None)
    if judge is None:
        return None
    model = ModelSection(path=judge.path) if judge.path else policy
    if judge.chat_template is not None:
        model = model.model_copy(update={"chat_template": judge.chat_template})
    return context.model("judge", model)


def _with_template(reward: Reward) -> Reward:
    """A judge with the text of its template: actors may not see the file."""
    if not isinstance(reward, JudgeReward) or reward.is_inline:
        return reward
    try:
        text = Path(reward.template).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"online.rewards: '{reward.name}': template={reward.template}: {error}") from error
    filled = reward.model_copy(update={"template": text})
    if not filled.is_inline:
        raise ConfigError(
            f"online.rewards: '{reward.name}': template={reward.template}: the file has no {{completion}}"
        )
    return filled


def _token(variable: str) -> SecretStr:
    token = os.environ.get(variable)
    if not token:
        raise ConfigError(f"online.rewards: token_env={variable}: the environment variable is not set")
    return SecretStr(token)


def demand_rewards(context: StageContext, policy: ModelSection, rewards: RewardModels) -> list[RoleDemand]:
    placement = context.config.placement
    engine, shape, is_served = context.config.engine, model_size(policy), placement.reward.backend == "vllm"
    memory = engine_memory(shape, engine)
    if not is_served:
        ranks, num_models = placement.reward.count, len(rewards.models)
        memory = frozen_memory(shape, context.config.training, num_models, num_ranks=ranks, scores=True)
    width = engine.tensor_parallel_size if is_served else 1
    demands = [RoleDemand("reward", placement.reward, context.main_memory(memory), width)]
    if rewards.judge is not None:
        memory = context.main_memory(engine_memory(model_size(rewards.judge), engine))
        demands.append(RoleDemand("judge", placement.judge, memory, engine.tensor_parallel_size))
    return demands


def build_scorer(
    context: StageContext, placement: Placement, policy: ModelSection, rewards: RewardModels
) -> RemoteScorer:
    """Begin to build the workers, reward models in parts if they have several ranks; see
    `Placement.wait_until_built`."""
    online = context.config.online
    assert online is not None
    judge = None
    if rewards.judge is not None:
        judge = placement.start("judge")
        _build(
            context,
            placement,
            judge,
            sections=rewards.judges,
            policy=policy,
            model=rewards.judge,
            engine=context.config.engine,
            sleeps=placement.shares_devices("judge"),
        )
    reward = placement.start("reward")
    _build(
        context,
        placement,
        reward,
        context.worlds(placement, reward) if len(reward) > 1 else (),
        policy=policy,
        sources=rewards.sources,
        training=context.config.training,
        device=context.device(placement, "reward"),
        tokens=rewards.tokens,
        has_environment=online.environment is not None,
        engine=_engine(context, placement, online),
    )
    return RemoteScorer(reward, judge)


def _engine(context: StageContext, placement: Placement, online: OnlineSection) -> RewardEngine | None:
    if context.config.placement.reward.backend != "vllm":
        return None
    longest = online.max_prompt_length + online.max_response_length
    return RewardEngine(context.config.engine, longest, placement.shares_devices("reward"))


def _build(
    context: StageContext,
    placement: Placement,
    group: ActorGroup,
    worlds: Sequence[World] = (),
    **options: object,
) -> None:
    """Args: worlds: of ranks that compute together."""
    worker = {"reward": "RewardWorker", "judge": "JudgeWorker"}[group.name]
    arguments = {**options, "threads": placement.shares[group.name].threads}
    group.build(
        f"rlhf_ray.workers.rewards:{worker}",
        [{**arguments, "world": world} for world in worlds] or [arguments],
        context.config.cluster.start_timeout,
        # Ranks that hold models in parts have a process group, which a new one could not join.
        is_pure=len(group) == 1,
    )
