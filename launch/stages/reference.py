"""The frozen reference, which reads what the policy or a person wrote."""

from __future__ import annotations

from collections.abc import Sequence

from actors.group import ActorGroup
from launch.memory import engine_memory, frozen_memory, model_size
from launch.placement import Placement, RoleDemand
from launch.stages.context import StageContext
from rlhf_ray.config.schema import ModelSection
from rlhf_ray.engines.deepspeed_engine import World

ROLE = "reference"


def is_served(context: StageContext) -> bool:
    """By vLLM engines, of which one alone answers a call."""
    return context.config.placement.reference.backend == "vllm"


def demand_reference(context: StageContext, model: ModelSection) -> RoleDemand:
    config, section = context.config, context.config.placement.reference
    if is_served(context):
        memory = engine_memory(model_size(model), config.engine)
        return RoleDemand(ROLE, section, context.main_memory(memory), config.engine.tensor_parallel_size)
    memory = frozen_memory(model_size(model), config.training, num_ranks=section.count)
    return RoleDemand(ROLE, section, context.main_memory(memory))


def start_reference(
    context: StageContext, placement: Placement, model: ModelSection, longest: int
) -> ActorGroup:
    """Begin to build it: engines, or ranks, which have it in parts if they are several; see
    `Placement.wait_until_built`.

    Args:
        longest: tokens of the longest row that it will read.
    """
    group = placement.start(ROLE)
    if is_served(context):
        _build_engines(context, placement, group, model, longest)
    else:
        _build_ranks(context, placement, group, model)
    return group


def _build_engines(
    context: StageContext, placement: Placement, group: ActorGroup, model: ModelSection, longest: int
) -> None:
    arguments: dict[str, object] = {
        "model_folder": model.path,
        "section": context.config.engine,
        "longest": longest,
        "threads": placement.shares[ROLE].threads,
        "sleeps": placement.shares_devices(ROLE),
    }
    factory, timeout = "rlhf_ray.workers.served:ServedReference", context.config.cluster.start_timeout
    group.build(factory, [arguments] * len(group), timeout, is_pure=True)


def _build_ranks(context: StageContext, placement: Placement, group: ActorGroup, model: ModelSection) -> None:
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
