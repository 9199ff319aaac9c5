"""The configuration of a run: its stages and what they stand on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from rlhf_ray.config.schema.base import ModelSection, NonNegative, Section
from rlhf_ray.config.schema.checkpoint import CheckpointSection
from rlhf_ray.config.schema.constitution import ConstitutionSection
from rlhf_ray.config.schema.machinery import (
    ClusterSection,
    EngineSection,
    LoggingSection,
    PlacementSection,
    SyncSection,
    TrainingSection,
)
from rlhf_ray.config.schema.online import OnlineSection
from rlhf_ray.config.schema.preference import PreferenceSection
from rlhf_ray.config.schema.preferences import PreferencesSection
from rlhf_ray.config.schema.supervised import RewardSection, SFTSection

StageName = Literal["sft", "constitution", "preferences", "reward", "preference", "online"]
STAGES: tuple[StageName, ...] = ("sft", "constitution", "preferences", "reward", "preference", "online")


def turn_names(stages: Sequence[StageName]) -> tuple[str, ...]:
    """A name for each turn of a pipeline, which is also that of its folder: the second `preferences` is
    `preferences-2`."""
    seen: Counter[str] = Counter()
    names = []
    for stage in stages:
        seen[stage] += 1
        names.append(stage if seen[stage] == 1 else f"{stage}-{seen[stage]}")
    return tuple(names)


class RunConfig(Section):
    output_dir: Path
    seed: NonNegative = 0
    resume: Literal["never", "auto"] = "never"
    model: ModelSection = ModelSection()
    pipeline: tuple[StageName, ...] = ()

    sft: SFTSection | None = None
    constitution: ConstitutionSection | None = None
    preferences: PreferencesSection | None = None
    reward: RewardSection | None = None
    preference: PreferenceSection | None = None
    online: OnlineSection | None = None

    training: TrainingSection = TrainingSection()
    engine: EngineSection = EngineSection()
    sync: SyncSection = SyncSection()
    placement: PlacementSection = PlacementSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    cluster: ClusterSection = ClusterSection()

    @property
    def stages(self) -> tuple[StageName, ...]:
        """The stages in the order in which they run, one as often as it runs."""
        return self.pipeline or tuple(name for name in STAGES if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _complete(self) -> RunConfig:
        present = [name for name in STAGES if getattr(self, name) is not None]
        mistakes = []
        if not present:
            mistakes.append(f"no stage: add one of the sections {', '.join(STAGES)}")
        if len(present) > 1 and not self.pipeline:
            mistakes.append(f"pipeline: missing; say in which order to run {', '.join(present)}")
        mistakes += [
            f"pipeline: '{name}' has no section of its own" for name in self.pipeline if name not in present
        ]
        mistakes += [
            f"{name}: not in pipeline" for name in present if self.pipeline and name not in self.pipeline
        ]
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self
