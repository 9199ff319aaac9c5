"""Starting the roles of the online stage and connecting the policy to the engines."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from actors.group import ActorGroup
from actors.host import AsyncHost, Host
from actors.roles import (
    RemoteAdapterReference,
    RemoteCritic,
    RemoteExperience,
    RemoteGenerator,
    RemotePolicy,
    RemoteReference,
    RemoteStreamingGenerator,
)
from actors.transfer import Transfer
from launch.placement import Placement, RoleDemand
from launch.stages.context import StageContext
from launch.stages.generation import build_engines, demand_engine, streams
from launch.stages.reference import demand_reference, is_served, start_reference
from launch.stages.rewards import RewardModels, build_scorer, demand_rewards
from rlhf_ray.config.schema import ModelSection, OnlineSection, OptimizerSection
from rlhf_ray.loops.online import OnlineRoles
from rlhf_ray.roles import Reference
from rlhf_ray.types import Prompts, Ragged
from rlhf_ray.weights.sync import Backend, choose_backend

PROBE = {"bfloat16": (8, 32), "float32": (2, 16)}
"""Rows and tokens. Few would do for wrong weights, which are off by many times the tolerance; movement
below it has to stand out from the noise between trainer and engine, a thousandth if both are in float32."""


@dataclass(frozen=True)
class OnlineModels:
    policy: ModelSection
    reference: ModelSection
    rewards: RewardModels


def adapters_hold_reference(context: StageContext, models: OnlineModels) -> bool:
    """Whether the policy without its adapters is the reference, which then needs no actor."""
    return context.config.training.lora is not None and models.reference == models.policy


def demands(context: StageContext, models: OnlineModels) -> list[RoleDemand]:
    section = context.config.online
    assert section is not None
    found = [
        context.demand_trained("policy", models.policy),
        *demand_rewards(context, models.policy, models.rewards),
        demand_engine(context, models.policy, is_apart=_engines_apart(context, section)),
    ]
    if section.uses_critic:
        found.append(context.demand_trained("critic", models.policy))
    if section.uses_reference and not adapters_hold_reference(context, models):
        found.append(demand_reference(context, models.reference))
    return found


def _engines_apart(context: StageContext, section: OnlineSection) -> bool:
    mode = context.config.placement.mode
    return mode == "disaggregated" or section.max_lag > 0 or streams(context)


@dataclass(frozen=True)
class OnlineBuilder:
    context: StageContext
    placement: Placement
    models: OnlineModels

    @property
    def section(self) -> OnlineSection:
        section = self.context.config.online
        assert section is not None
        return section

    def build(self, prompts: Prompts) -> OnlineRoles:
        """Start every role; the slow ones (importing, loading) start side by side."""
        context = self.context
        policy, backend, engines = self._policy_and_engines()
        critic = self._critic() if self.section.uses_critic else None
        transfer = self._transfer(policy, engines, backend)
        generator = RemoteStreamingGenerator(engines) if streams(context) else RemoteGenerator(engines)
        roles = OnlineRoles(
            generator=generator,
            scorer=build_scorer(context, self.placement, self.models.policy, self.models.rewards),
            reference=self._reference(policy) if self.section.uses_reference else None,
            policy=RemotePolicy(policy, context.config.sync, generator, self._probe(prompts), transfer),
            critic=critic,
            experience=RemoteExperience(self._experience()),
        )
        self.placement.wait_until_built()
        transfer.join()
        return roles

    def _reference(self, policy: ActorGroup) -> Reference:
        if adapters_hold_reference(self.context, self.models):
            return RemoteAdapterReference(policy)
        group = start_reference(self.context, self.placement, self.models.reference, self._longest)
        return RemoteReference(group, is_served=is_served(self.context))

    @property
    def _longest(self) -> int:
        """Tokens of a prompt and its answer."""
        return self.section.max_prompt_length + self.section.max_response_length

    def _policy_and_engines(self) -> tuple[ActorGroup, Backend, ActorGroup]:
        config = self.context.config
        dtype = getattr(torch, config.engine.number_format)
        engines = self.placement.start("engine", AsyncHost if streams(self.context) else Host)
        policy = self.placement.start("policy")
        backend: Backend = "gloo"  # transformers receives over gloo, whatever device it is on
        if config.engine.backend == "vllm":
            backend = choose_backend(self.placement.devices(policy), self.placement.devices(engines))
        build_engines(
            self.context,
            self.placement,
            engines,
            self.models.policy,
            self._longest,
            weight_backend=backend,
            online=self.section,
        )
        if backend == "ipc":
            # vLLM measures how much of the GPU is free; nobody else may be loading there meanwhile.
            engines.wait_until_built()
        self._trained(
            policy, "policy:PolicyWorker", self.section.optimizer, self.models.policy, wire_dtype=dtype
        )
        return policy, backend, engines

    def _trained(
        self,
        group: ActorGroup,
        factory: str,
        optimizer: OptimizerSection,
        model: ModelSection,
        **options: object,
    ) -> None:
        # The policy sits the first steps out while only the critic learns.
        sits_out = self.section.uses_critic and group.name == "policy"
        idle = self.section.critic_warmup_steps if sits_out else 0
        steps = (self.section.num_steps - idle) * self.section.num_ppo_epochs * self.section.num_mini_batches
        self.context.build_trained(
            self.placement, group, factory, optimizer, steps, model=model, online=self.section, **options
        )

    def _critic(self) -> RemoteCritic:
        group = self.placement.start("critic")
        self._trained(group, "scalar:CriticWorker", self.section.critic_optimizer, self._critic_start())
        return RemoteCritic(group)

    def _critic_start(self) -> ModelSection:
        policy = self.models.policy
        return self.models.rewards.critic_start(policy) if self.section.critic_init == "reward" else policy

    def _experience(self) -> ActorGroup:
        group = self.placement.start_helper("experience")
        arguments = {
            "section": self.section,
            "policy": self.models.policy,
            "rollouts_folder": self.context.folder.rollouts.resolve(),
        }
        group.build(
            "rlhf_ray.workers.experience:ExperienceWorker",
            [arguments],
            self.context.config.cluster.start_timeout,
            # Running moments of the rewards are all that it remembers from step to step.
            is_pure=not self.section.normalize_rewards,
        )
        return group

    def _probe(self, prompts: Prompts) -> Ragged:
        """Fixed token sequences on which engine and trainer are compared after a sync."""
        config = self.context.config
        in_float32 = config.engine.number_format == "float32" and not config.training.uses_bfloat16
        num_rows, num_tokens = PROBE["float32" if in_float32 else "bfloat16"]
        rows = islice(prompts.token_ids, num_rows)
        return Ragged.from_rows([row[-num_tokens:] for row in rows], np.int32)

    def _transfer(self, policy: ActorGroup, engines: ActorGroup, backend: Backend) -> Transfer:
        config = self.context.config
        tensor_parallel = config.engine.tensor_parallel_size
        return Transfer(policy, engines, backend, tensor_parallel, float(config.cluster.start_timeout))
