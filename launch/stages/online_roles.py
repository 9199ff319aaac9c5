"""Starting the roles of the online stage and connecting the policy to the engines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from actors.engine_calls import RemoteEngineCalls
from actors.group import ActorGroup
from actors.roles import (
    RemoteCritic,
    RemoteExperience,
    RemoteGenerator,
    RemotePolicy,
    RemoteReference,
    RemoteScorer,
)
from launch.memory import frozen_memory, model_size
from launch.placement import Placement, RoleDemand
from launch.stages.context import StageContext
from launch.stages.generation import build_engines, demand_engine
from rlhf_ray.config.schema import ModelSection, OnlineSection, OptimizerSection, Reward
from rlhf_ray.loops.online import OnlineRoles
from rlhf_ray.types import Prompts, Ragged
from rlhf_ray.weights.sync import Backend, TransferSpec, choose_backend

PROBE_ROWS, PROBE_TOKENS = 8, 64


@dataclass(frozen=True)
class OnlineModels:
    """Fields: rewards: each source, with the model of those that are one."""

    policy: ModelSection
    reference: ModelSection
    rewards: list[tuple[Reward, ModelSection | None]]

    @property
    def reward_models(self) -> list[ModelSection]:
        return [model for _, model in self.rewards if model is not None]


def demands(context: StageContext, models: OnlineModels) -> list[RoleDemand]:
    placement, section = context.config.placement, context.config.online
    assert section is not None
    size = model_size(models.policy)
    rewards = frozen_memory(size, len(models.reward_models))
    found = [
        context.demand_trained("policy", models.policy),
        RoleDemand("reward", placement.reward, context.main_memory(rewards)),
        demand_engine(context, models.policy),
    ]
    if section.uses_critic:
        found.append(context.demand_trained("critic", models.policy))
    if section.uses_reference:
        memory = context.main_memory(frozen_memory(size))
        found.append(RoleDemand("reference", placement.reference, memory))
    return found


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
        generator = RemoteGenerator(engines)
        roles = OnlineRoles(
            generator=generator,
            scorer=RemoteScorer(
                self._frozen(
                    "reward",
                    policy=self.models.policy,
                    sources=self.models.rewards,
                    has_environment=self.section.environment is not None,
                )
            ),
            reference=self._reference() if self.section.uses_reference else None,
            policy=RemotePolicy(policy, context.config.sync, generator, _probe(prompts)),
            critic=critic,
            experience=RemoteExperience(self._experience()),
        )
        self.placement.wait_until_built()
        self._connect(policy, engines, backend)
        return roles

    def _policy_and_engines(self) -> tuple[ActorGroup, Backend, ActorGroup]:
        config = self.context.config
        dtype = torch.bfloat16 if config.engine.dtype == "bfloat16" else torch.float32
        engines = self.placement.start("engine")
        policy = self.placement.start("policy")
        backend: Backend = "gloo"  # transformers receives over gloo, whatever device it is on
        if config.engine.backend == "vllm":
            backend = choose_backend(policy.gpus(), engines.gpus())
        max_model_len = self.section.max_prompt_length + self.section.max_response_length
        build_engines(
            self.context, self.placement, engines, self.models.policy, max_model_len, weight_backend=backend
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
        idle = self.section.critic_warmup_steps if group.name == "policy" else 0
        steps = (self.section.num_steps - idle) * self.section.num_ppo_epochs * self.section.num_mini_batches
        self.context.build_trained(
            self.placement, group, factory, optimizer, steps, model=model, online=self.section, **options
        )

    def _critic(self) -> RemoteCritic:
        group = self.placement.start("critic")
        self._trained(group, "scalar:CriticWorker", self.section.critic_optimizer, self._critic_start())
        return RemoteCritic(group)

    def _reference(self) -> RemoteReference:
        return RemoteReference(self._frozen("reference", model=self.models.reference))

    def _critic_start(self) -> ModelSection:
        return self.models.reward_models[0] if self.section.critic_init == "reward" else self.models.policy

    def _frozen(self, role: str, **options: object) -> ActorGroup:
        group = self.placement.start(role)
        share = self.placement.shares[role]
        where = {"device": self.context.device(self.placement, role), "threads": share.threads}
        factory = {"reward": "RewardWorker", "reference": "ReferenceWorker"}[role]
        arguments = {**options, **where, "training": self.context.config.training}
        group.build(
            f"rlhf_ray.workers.frozen:{factory}", [arguments], self.context.config.cluster.start_timeout
        )
        return group

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
        )
        return group

    def _connect(self, policy: ActorGroup, engines: ActorGroup, backend: Backend) -> None:
        """Join the policy's ranks and the engines in one transfer group."""
        cluster = self.context.config.cluster
        tensor_parallel = self.context.config.engine.tensor_parallel_size
        address, port = policy.address().rsplit(":", 1)
        spec = TransferSpec(
            backend=backend,
            num_receivers=len(engines) * tensor_parallel,
            master_address=address,
            master_port=int(port),
            timeout=float(cluster.start_timeout),
        )
        calls = [
            RemoteEngineCalls(handle, f"engine[{index}]", float(cluster.call_timeout))
            for index, handle in enumerate(engines.handles)
        ]
        policy.call("connect", calls, spec, tensor_parallel).result()


def _probe(prompts: Prompts) -> Ragged:
    """Fixed token sequences on which engine and trainer are compared after a sync."""
    rows = range(min(PROBE_ROWS, len(prompts)))
    return Ragged.from_rows([prompts.token_ids[row][-PROBE_TOKENS:] for row in rows], np.int32)
