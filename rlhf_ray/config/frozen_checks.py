"""What models that are only read can be asked for, and where: in parts, or in vLLM engines."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_ray.config.document import KeyPath
from rlhf_ray.config.model_checks import max_positions
from rlhf_ray.config.parts import Parts
from rlhf_ray.config.schema import (
    ModelSection,
    OnlineSection,
    PlacementSection,
    PreferenceSection,
    StageName,
    TrainingSection,
)
from rlhf_ray.config.schema.preference import USED_BY

Finding = tuple[KeyPath, str]
REFERENCE = ("placement", "reference", "backend")


def frozen_mistakes(parts: Parts, placement: PlacementSection) -> Iterator[Finding]:
    online = parts.get(OnlineSection, "online")
    if online and placement.reward.backend == "vllm":
        yield from _served_reward(online, placement.reward.count)
    elif online and placement.reward.count > 1 and not online.uses_reward_model:
        yield (
            ("placement", "reward", "count"),
            "none of online.rewards is of type model or ensemble, and only models are held in parts; use 1",
        )
    if placement.reference.backend == "vllm":
        if online and online.uses_reference:
            yield from _served_reference(parts, online)
        yield from _lengths(parts)


def _served_reward(online: OnlineSection, count: int) -> Iterator[Finding]:
    if count > 1:
        yield (
            ("placement", "reward", "count"),
            "with backend: vllm one engine serves the reward model; use 1, and spread it by "
            "engine.tensor_parallel_size",
        )
    single = [reward for reward in online.rewards if reward.type == "model"]
    if len(single) != 1 or any(reward.type == "ensemble" for reward in online.rewards):
        yield (
            ("placement", "reward", "backend"),
            "an engine serves one reward model, and online.rewards must have exactly one, of type model; use "
            "torch",
        )


def _served_reference(parts: Parts, online: OnlineSection) -> Iterator[Finding]:
    if online.temperature != 1:
        yield (
            REFERENCE,
            "vLLM gives log-probs of given tokens at temperature 1 alone, and "
            f"online.temperature={online.temperature:g}; use torch, or temperature: 1",
        )
    training = parts.get(TrainingSection, "training")
    if training and training.lora is not None and online.reference in (None, _start(parts, "online")):
        yield (
            REFERENCE,
            "with training.lora the policy without its adapters is the reference, and no other is started; "
            "leave it out, or name another model in online.reference",
        )


def _lengths(parts: Parts) -> Iterator[Finding]:
    """vLLM samples a token behind what it is asked about, and there must be a place for it."""
    online, preference = parts.get(OnlineSection, "online"), parts.get(PreferenceSection, "preference")
    asked: list[tuple[StageName, int, ModelSection | None]] = []
    if online and online.uses_reference:
        asked.append(("online", online.max_prompt_length + online.max_response_length, online.reference))
    if preference and preference.algorithm in USED_BY["reference"]:
        asked.append(("preference", preference.max_length, preference.reference))
    for stage, longest, named in asked:
        model = named or _start(parts, stage)
        positions = max_positions(model.path) if model else None
        if positions is not None and longest == positions:
            yield (
                REFERENCE,
                f"vLLM samples a token behind the {longest} of the longest row of {stage}, and the "
                f"reference is made for {positions}; use torch, or shorter rows",
            )


def _start(parts: Parts, stage: StageName) -> ModelSection | None:
    start = parts.start_of(stage)
    return parts.get(ModelSection, *start) if start else None
