"""What stages hand to each other: models and datasets, by folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rlhf_ray.config.schema import DatasetSection, ModelSection, RunConfig, StageName
from rlhf_ray.loops.preferences import DATASET_FILE
from rlhf_ray.reporting.run_folder import RunFolder


@dataclass(frozen=True)
class Artefacts:
    """
    Fields:
        policy: the newest language model.
        reward_model, preferences: what this pipeline made so far, if it did.
    """

    policy: ModelSection
    reward_model: ModelSection | None = None
    preferences: DatasetSection | None = None

    def after(self, stage: StageName, folder: RunFolder) -> Artefacts:
        """With what the finished stage left in its folder."""
        if stage == "reward":
            return replace(self, reward_model=_model(folder.model))
        if stage == "preferences":
            return replace(self, preferences=DatasetSection(path=str(folder.path / DATASET_FILE)))
        return replace(self, policy=_model(folder.model))

    @classmethod
    def at_start(cls, config: RunConfig) -> Artefacts:
        return cls(policy=config.model)


def _model(folder: Path) -> ModelSection:
    # The chat template was saved with the model.
    return ModelSection(path=str(folder))
