"""What placement, training and the stages ask of each other."""

from __future__ import annotations

import os
from collections.abc import Iterator

from rlhf_ray.config.document import KeyPath
from rlhf_ray.config.frozen_checks import frozen_mistakes
from rlhf_ray.config.parts import Parts
from rlhf_ray.config.schema import (
    ConstitutionSection,
    EngineSection,
    OnlineSection,
    PlacementSection,
    SFTSection,
    TrainingSection,
)

Finding = tuple[KeyPath, str]


def placement_mistakes(parts: Parts) -> Iterator[Finding]:
    placement = parts.get(PlacementSection, "placement")
    training = parts.get(TrainingSection, "training")
    if placement and training:
        yield from _sequence_parallel(parts, placement, training)
        yield from _ranks(parts, placement, training)
        yield from _turns(parts, placement, training)
    if placement:
        yield from frozen_mistakes(parts, placement)
    yield from _engine(parts)
    if training and training.nvme_path is not None and not os.path.isdir(training.nvme_path):
        yield ("training", "nvme_path"), "no such folder here; make it on every node"


def _sequence_parallel(
    parts: Parts, placement: PlacementSection, training: TrainingSection
) -> Iterator[Finding]:
    size = training.sequence_parallel_size
    online = parts.get(OnlineSection, "online")
    trained = {"policy": placement.policy.count}
    if online and online.uses_critic:
        trained["critic"] = placement.critic.count
    for role, count in trained.items():
        if count % size:
            yield (
                ("training", "sequence_parallel_size"),
                f"does not divide placement.{role}.count={count}, and so many ranks share a sequence; change "
                "one of them",
            )


def _ranks(parts: Parts, placement: PlacementSection, training: TrainingSection) -> Iterator[Finding]:
    """Every rank, or group of ranks that share sequences, needs a row of every batch."""
    shared = training.sequence_parallel_size
    ranks = "ranks" if shared == 1 else f"groups of {shared} ranks"
    online = parts.get(OnlineSection, "online")
    for tuned in (parts.get(SFTSection, "sft"), parts.get(ConstitutionSection, "constitution")):
        if tuned and tuned.batch_size < placement.policy.count // shared:
            name = "sft" if isinstance(tuned, SFTSection) else "constitution"
            yield (
                ("placement", "policy", "count"),
                f"more {ranks} than rows in {name}.batch_size={tuned.batch_size}",
            )
    if online:
        size = online.samples_per_step // online.num_mini_batches
        for role, count in (("policy", placement.policy.count), ("critic", placement.critic.count)):
            if size < count // shared:
                yield (
                    ("placement", role, "count"),
                    f"more {ranks} than a mini-batch has samples (prompts_per_step * num_generations / "
                    f"num_mini_batches = {size}); lower it, or raise online.prompts_per_step",
                )


def _turns(parts: Parts, placement: PlacementSection, training: TrainingSection) -> Iterator[Finding]:
    """What roles that share devices cannot do."""
    if placement.mode == "auto":
        return
    mode = ("placement", "mode")
    online = parts.get(OnlineSection, "online")
    if online and placement.mode == "colocated" and online.max_lag > 0:
        yield (
            mode,
            f"with online.max_lag={online.max_lag} the engines work beside the trainer, and here they sleep "
            "while it works; use disaggregated, or max_lag: 0",
        )
    if online and placement.mode == "colocated" and online.stragglers == "drop":
        yield (
            mode,
            "with online.stragglers=drop engines go on while the trainer works, and here they sleep; use "
            "disaggregated, or stragglers: wait",
        )
    if training.zero_stage == 0:
        yield (
            mode,
            "waiting models move to main memory, which DeepSpeed does from ZeRO 1 on; use "
            "training.zero_stage: 1, 2 or 3",
        )
    if training.lora is not None and training.zero_stage == 3:
        yield (
            mode,
            "at training.zero_stage=3 DeepSpeed cannot move the frozen weights beside adapters; use 1 or 2, "
            "or placement.mode: auto",
        )
    if training.offload_parameters != "none" and training.offload_optimizer == "none":
        yield (
            mode,
            f"DeepSpeed moves no optimizer beside training.offload_parameters={training.offload_parameters}; "
            "use offload_optimizer too",
        )


def _engine(parts: Parts) -> Iterator[Finding]:
    engine = parts.get(EngineSection, "engine")
    if engine and engine.backend == "transformers" and engine.tensor_parallel_size > 1:
        yield (
            ("engine", "tensor_parallel_size"),
            "the transformers backend runs on one device; use 1, or backend: vllm",
        )
