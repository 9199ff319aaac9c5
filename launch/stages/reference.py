"""The frozen reference, which reads what the policy or a person wrote."""

from __future__ import annotations

from collections.abc import Sequence

from actors.group import ActorGroup
from launch.memory import frozen_memory, model_size
from launch.placement import Placement, RoleDemand
from launch.stages.context import StageContext
from rlhf_ray.config.schema import ModelSection
from rlhf_ray.engines.deepspeed_engine import World

ROLE = "reference"


def demand_reference(context: StageContext, model: ModelSection) -> RoleDemand:
    section, training = context.config.placement.reference, context.config.training
    memory = context.main_memory(frozen_memory(model_size(model), training, num_ranks=section.count))
    return RoleDemand(ROLE, section, memory)


def start_reference(context: StageContext, placement: Placement, model: ModelSection) -> ActorGroup:
    """Begin to build it, in parts if it has several ranks; see `Placement.wait_until_built`."""
    group = placement.start(ROLE)
    worlds: Sequence[World | None] = [None]
    if len(group) > 1:
        worlds = context.worlds(placement, group)
    arguments: list[dict[str, object]] = [
        {
            "model": model,
            "training": context.config.training,
            "device": context.device(placement, ROLE),
            "threads": placement.shares[ROLE].threads,
            "world": world,
        }
        for world in worlds
    ]
    factory = "rlhf_ray.workers.frozen:ReferenceWorker"
    # Ranks that hold a model in parts have a process group, which a new one could not join.
    is_pure = len(group) == 1
    group.build(factory, arguments, context.config.cluster.start_timeout, is_pure=is_pure)
    return group
