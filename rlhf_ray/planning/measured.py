"""What real workers took of a machine's memory, and what is planned for them.

The figures are those of `rlhf-ray bench plan-memory` on a CPU; those of the models named tiny and small set
the constants of `planning.memory`, those of the embedded 135M (large) are held against them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_ray.config.schema import EngineSection, TrainingSection
from rlhf_ray.planning import memory
from rlhf_ray.planning.hardware import GIB, cpu
from rlhf_ray.planning.shapes import KNOWN, ModelShape

ROW = 256
"""Tokens of a row."""
MODELS = {
    "tiny": ModelShape(2, 64, 128, heads=2, kv_heads=1, head_dim=32, vocabulary=49_152, tied=True),
    "small": ModelShape(8, 512, 1536, heads=8, kv_heads=4, head_dim=64, vocabulary=49_152, tied=True),
    "large": KNOWN["HuggingFaceTB/SmolLM2-135M"],
}
"""The first two have random weights; the last is the embedded model."""
WITHIN = 0.15


@dataclass(frozen=True)
class Case:
    """Fields: model: of `MODELS`. training: what differs from float32 weights on one rank at ZeRO 0."""

    model: str
    role: str
    ranks: int = 1
    training: dict[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        changed = [f"{key} {value}" for key, value in self.training.items()]
        ranks = [f"{self.ranks} ranks"] if self.ranks > 1 else []
        return ", ".join([f"{self.model} {self.role}", *ranks, *changed])

    @property
    def training_section(self) -> TrainingSection:
        given = {"tokens_per_micro_batch": 2048, "zero_stage": 0, **self.training}
        return TrainingSection.model_validate(given)

    @property
    def engine_section(self) -> EngineSection:
        return EngineSection(cpu_kv_cache_gib=0.25)

    @property
    def planned(self) -> float:
        """Bytes."""
        shape, training, device = MODELS[self.model], self.training_section, cpu(cores=1, memory=0)
        if self.role == "engine":
            found = memory.engine("engine", shape, self.engine_section, longest=2 * ROW, device=device)
        elif self.role == "reference":
            found = memory.frozen("reference", [shape], training, longest=ROW, device=device)
        else:
            role: memory.Trained = "critic" if self.role == "critic" else "policy"
            found = memory.trained(role, shape, training, ranks=self.ranks, longest=ROW, device=device)
        return found.peak


MEASURED = (
    (Case("tiny", "policy", 1, {}), 0.76),
    (Case("tiny", "critic", 1, {}), 0.54),
    (Case("tiny", "reference", 1, {}), 0.65),
    (Case("tiny", "engine", 1, {}), 1.06),
    (Case("small", "policy", 1, {}), 2.29),
    (Case("small", "policy", 1, {"gradient_checkpointing": True}), 1.80),
    (Case("small", "policy", 1, {"tokens_per_micro_batch": 4096, "gradient_checkpointing": True}), 2.13),
    (Case("small", "policy", 1, {"zero_stage": 1}), 2.51),
    (Case("small", "policy", 2, {"zero_stage": 2}), 2.11),
    (Case("small", "policy", 2, {"zero_stage": 3, "gradient_checkpointing": True}), 2.11),
    (Case("small", "policy", 1, {"lora": {"rank": 16}}), 1.70),
    (Case("small", "policy", 1, {"precision": "float32"}), 2.59),
    (Case("small", "critic", 1, {}), 2.15),
    (Case("small", "reference", 1, {}), 0.83),
    (Case("small", "engine", 1, {}), 1.39),
    (Case("large", "policy", 1, {}), 5.79),
    (Case("large", "policy", 1, {"zero_stage": 1, "gradient_checkpointing": True}), 4.51),
    (Case("large", "critic", 1, {"tokens_per_micro_batch": 1024}), 4.14),
    (Case("large", "reference", 1, {}), 1.16),
    (Case("large", "engine", 1, {}), 1.71),
)
"""Case -> GiB that the largest of its processes had at most."""


def errors() -> dict[str, float]:
    """Of each case, measured over planned, less 1."""
    return {case.name: gib * GIB / case.planned - 1 for case, gib in MEASURED}


def accuracy() -> str:
    """What may be said of a planned figure."""
    found = sorted(errors().values())
    return (
        f"memory of real workers, {len(found)} settings of models up to 135M on a CPU: {found[0]:+.0%} to "
        f"{found[-1]:+.0%} of what is planned for them; on GPUs nothing is measured yet (docs/planning.md)"
    )
