"""Starting generation engines: shared by the stages that sample."""

from __future__ import annotations

from actors.group import ActorGroup
from launch.memory import engine_memory, model_size
from launch.placement import Placement, RoleDemand
from launch.stages.context import StageContext, naming
from rlhf_ray.config.schema import DatasetSection, ModelSection, OnlineSection, RoleSection
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.encoding import encode_prompts
from rlhf_ray.data.formats import prompt_examples
from rlhf_ray.engines.generation import UNKNOWN_VERSION
from rlhf_ray.seeds import derive_seed
from rlhf_ray.types import Prompts
from rlhf_ray.weights.sync import Backend

_FACTORIES = {
    "vllm": "rlhf_ray.engines.vllm_generator:VLLMGenerator",
    "transformers": "rlhf_ray.engines.hf_generator:HFGenerator",
}


def demand_engine(
    context: StageContext,
    model: ModelSection,
    name: str = "engine",
    section: RoleSection | None = None,
    *,
    is_apart: bool = False,
) -> RoleDemand:
    """
    Args:
        name: of the role. section: what it takes; by default `placement.engine`.
        is_apart: it samples while other roles work.
    """
    engine = context.config.engine
    memory = context.main_memory(engine_memory(model_size(model), engine))
    return RoleDemand(
        name,
        section or context.config.placement.engine,
        memory,
        gpus_per_actor=engine.tensor_parallel_size,
        is_apart=is_apart,
    )


def streams(context: StageContext) -> bool:
    """Whether engines go on with what they are at when weights change. Episodes do not, since environments
    reply to all of them together."""
    online, engine = context.config.online, context.config.engine
    if online is None or online.environment or engine.backend != "vllm":
        return False
    return online.max_lag > 0 or online.stragglers == "drop"


def build_engines(
    context: StageContext,
    placement: Placement,
    group: ActorGroup,
    model: ModelSection,
    max_model_len: int,
    *,
    version: int = UNKNOWN_VERSION,
    weight_backend: Backend = "gloo",
    online: OnlineSection | None = None,
) -> None:
    """Begin to build the engines; see `Placement.wait_until_built`.

    Args:
        version: of the weights in the model's folder; unknown where the trainer will publish others.
        weight_backend: how it will send them.
        online: of the stage whose environment replies to the answers, if it has one.
    """
    engine = context.config.engine
    arguments: list[dict[str, object]] = [
        {
            "model_folder": model.path,
            "section": engine,
            "max_model_len": max_model_len,
            "threads": placement.shares[group.name].threads,
            "version": version,
        }
        for _ in range(len(group))
    ]
    if engine.backend == "vllm":
        for rank, own in enumerate(arguments):
            own |= {"seed": derive_seed(context.seed, rank), "weight_backend": weight_backend}
            own["sleeps"] = placement.shares_devices(group.name)
    factory = _FACTORIES[engine.backend]
    if online is not None and online.environment is not None:
        episodes = {
            "engine": factory,
            "model": model,
            "section": online.environment,
            "max_prompt_length": online.max_prompt_length,
        }
        arguments = [{**episodes, "arguments": own} for own in arguments]
        factory = "rlhf_ray.environments.generator:build_environment_generator"
    if online is not None and streams(context):
        arguments = [
            {"engine": factory, "arguments": {**own, "kv_on_update": online.kv_on_update}}
            for own in arguments
        ]
        factory = "rlhf_ray.engines.streaming:StreamingGenerator"
    group.build(
        factory,
        arguments,
        context.config.cluster.start_timeout,
        is_pure=True,
        needs_weights=version == UNKNOWN_VERSION,
    )


def load_prompts(
    context: StageContext, section: DatasetSection, formatter: ChatFormatter, max_prompt_length: int
) -> Prompts:
    examples = context.examples(section, prompt_examples)
    with naming(section.path):
        prompts, skipped = encode_prompts(examples, formatter, max_prompt_length)
    context.report_skipped(section.path, skipped)
    return prompts
