"""The configuration of a run. Frozen; unknown keys are errors; every default is written here and nowhere
else.

A file has one section a stage (`sft`, `preferences`, `reward`, `online`) and `pipeline`, the order in which
they run. With one stage section, `pipeline` may be left out. Within a pipeline a stage that names no model
takes the newest one that an earlier stage made, and the top-level `model` if there is none; `reward.dataset`
is by default what `preferences` wrote, and a reward source of type `model` without a path is what `reward`
trained.
"""

from __future__ import annotations

from rlhf_ray.config.schema.algorithms import RECIPES, AlgorithmName, Recipe
from rlhf_ray.config.schema.base import (
    EMBEDDED_MODEL,
    EMBEDDED_TEMPLATE,
    DatasetSection,
    Fraction,
    ModelSection,
    NonNegative,
    OptimizerSection,
    Positive,
    Section,
)
from rlhf_ray.config.schema.environments import EnvironmentSection
from rlhf_ray.config.schema.machinery import (
    CheckpointSection,
    ClusterSection,
    EngineSection,
    LoggingSection,
    PlacementSection,
    RoleSection,
    SingleRoleSection,
    SyncSection,
    TrainingSection,
    WandbSection,
)
from rlhf_ray.config.schema.online import OnlineSection
from rlhf_ray.config.schema.preferences import (
    Annotator,
    FileAnnotator,
    PreferencesSection,
    SimulatedAnnotator,
)
from rlhf_ray.config.schema.rewards import FunctionReward, ModelReward, Reward
from rlhf_ray.config.schema.run import STAGES, RunConfig, StageName
from rlhf_ray.config.schema.supervised import RewardSection, SFTSection

__all__ = [
    "EMBEDDED_MODEL",
    "EMBEDDED_TEMPLATE",
    "RECIPES",
    "STAGES",
    "AlgorithmName",
    "Annotator",
    "CheckpointSection",
    "ClusterSection",
    "DatasetSection",
    "EngineSection",
    "EnvironmentSection",
    "FileAnnotator",
    "Fraction",
    "FunctionReward",
    "LoggingSection",
    "ModelReward",
    "ModelSection",
    "NonNegative",
    "OnlineSection",
    "OptimizerSection",
    "PlacementSection",
    "Positive",
    "PreferencesSection",
    "Recipe",
    "Reward",
    "RewardSection",
    "RoleSection",
    "RunConfig",
    "SFTSection",
    "Section",
    "SimulatedAnnotator",
    "SingleRoleSection",
    "StageName",
    "SyncSection",
    "TrainingSection",
    "WandbSection",
]
