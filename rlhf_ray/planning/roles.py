"""Which roles a stage has, with which models."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.config.schema import (
    EnsembleReward,
    JudgeReward,
    ModelReward,
    ModelSection,
    OnlineSection,
    RoleSection,
    RunConfig,
    StageName,
)
from rlhf_ray.config.schema.preference import USED_BY
from rlhf_ray.errors import ConfigError
from rlhf_ray.planning.layout import Wanted
from rlhf_ray.planning.shapes import ModelShape, shape_of

PROMPT = 512
"""Tokens of a prompt where its length has no limit."""


@dataclass(frozen=True)
class Cast:
    """The models of a stage's roles.

    Fields:
        stage: which one. policy: of the model that is trained, whatever the stage calls it.
        longest: tokens of its longest row. trains: whether the policy is trained, or only answers.
        rewards: one shape a reward model.
        reference: None where there is none, or where the policy without its adapters is it.
    """

    stage: StageName
    policy: ModelShape
    longest: int
    trains: bool = True
    engine: bool = False
    critic: ModelShape | None = None
    reference: ModelShape | None = None
    reference_in_policy: bool = False
    rewards: tuple[ModelShape, ...] = ()
    judge: ModelShape | None = None

    def wanted(self, config: RunConfig) -> list[Wanted]:
        """What placement gives them."""
        online = config.online if self.stage == "online" else None
        is_apart = online is not None and (online.max_lag > 0 or online.stragglers == "drop")
        used = {
            "policy": self.trains,
            "critic": self.critic is not None,
            "reference": self.reference is not None,
            "reward": bool(self.rewards),
            "judge": self.judge is not None,
            "engine": self.engine,
        }

        def wanted(role: str) -> Wanted:
            section: RoleSection = getattr(config.placement, role)
            width = config.engine.tensor_parallel_size if config.placement.is_engine(role) else 1
            share = None if section.gpus == "auto" else section.gpus
            if share is not None and share > 1:
                width = max(width, int(share))
            return Wanted(role, section.count, width, share, is_apart and role == "engine")

        return [wanted(role) for role, is_used in used.items() if is_used]


def main_stage(config: RunConfig) -> StageName:
    """The one that is planned where none is named: reinforcement learning has the most roles."""
    return "online" if "online" in config.stages else config.stages[-1]


def cast_of(config: RunConfig, stage: StageName) -> Cast:
    """
    Raises:
        ConfigError: there is no such stage. ModelError: the shape of a model cannot be told.
    """
    if stage not in config.stages:
        raise ConfigError(f"--stage {stage}: the configuration has {', '.join(dict.fromkeys(config.stages))}")
    section = getattr(config, stage)
    start = section.model or config.model
    policy = shape_of(start.path)
    if stage == "online":
        assert config.online is not None
        return _online_cast(config, config.online, start, policy)
    if stage == "preferences":
        longest = PROMPT + section.max_completion_length
        return Cast(stage, policy, longest, trains=False, engine=True)
    reference = None
    if config.preference is not None and stage == "preference":
        reads = config.preference.algorithm in USED_BY["reference"]
        # Cached, its log-probs are computed before anything is trained.
        if reads and not config.preference.cache_reference:
            reference = shape_of((config.preference.reference or start).path)
    return Cast(stage, policy, section.max_length, reference=reference)


def _online_cast(config: RunConfig, online: OnlineSection, start: ModelSection, policy: ModelShape) -> Cast:
    rewards: list[ModelShape] = []
    judge = None
    for reward in online.rewards:
        if isinstance(reward, ModelReward):
            rewards.append(shape_of(reward.path or _reward_start(config, start)))
        elif isinstance(reward, EnsembleReward):
            rewards += [shape_of(path) for path in reward.paths]
        elif isinstance(reward, JudgeReward):
            judge = shape_of(reward.path or start.path)
    critic = None
    if online.uses_critic:
        critic = rewards[0] if online.critic_init == "reward" and rewards else policy
    other = online.reference
    in_policy = config.training.lora is not None and (other is None or other == start)
    needs_reference = online.uses_reference and not in_policy
    return Cast(
        "online",
        policy,
        online.max_prompt_length + online.max_response_length,
        engine=True,
        critic=critic,
        reference=shape_of((other or start).path) if needs_reference else None,
        reference_in_policy=online.uses_reference and in_policy,
        rewards=tuple(rewards),
        judge=judge,
    )


def _reward_start(config: RunConfig, start: ModelSection) -> str:
    """Of the reward model that the pipeline trains."""
    section = config.reward.model if config.reward is not None else None
    return (section or start).path
