"""The frozen reference: one actor that reads what the policy or a person wrote."""

from __future__ import annotations

from actors.group import ActorGroup
from launch.memory import frozen_memory, model_size
from launch.placement import Placement, RoleDemand
from launch.stages.context import StageContext
from rlhf_ray.config.schema import ModelSection

ROLE = "reference"


def demand_reference(context: StageContext, model: ModelSection) -> RoleDemand:
    memory = context.main_memory(frozen_memory(model_size(model)))
    return RoleDemand(ROLE, context.config.placement.reference, memory)


def start_reference(context: StageContext, placement: Placement, model: ModelSection) -> ActorGroup:
    """Begin to build it; see `Placement.wait_until_built`."""
    group = placement.start(ROLE)
    arguments = {
        "model": model,
        "training": context.config.training,
        "device": context.device(placement, ROLE),
        "threads": placement.shares[ROLE].threads,
    }
    factory = "rlhf_ray.workers.frozen:ReferenceWorker"
    group.build(factory, [arguments], context.config.cluster.start_timeout, is_pure=True)
    return group
