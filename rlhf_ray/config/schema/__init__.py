"""The configuration of a run. Frozen; unknown keys are errors; every default is written here and nowhere
else.

A file has one section a stage (`sft`, `constitution`, `preferences`, `reward`, `preference`, `online`) and
`pipeline`, the order in which they run; a stage may be named more than once there. With one stage section,
`pipeline` may be left out. Within a pipeline a stage that names no model takes the newest one that an earlier
stage made, and the top-level `model` if there is none; `reward.dataset` and `preference.dataset` are by
default what `preferences` wrote last, and a reward source of type `model` without a path is what `reward`
trained.
"""

from __future__ import annotations

from rlhf_ray.config.schema.algorithms import RECIPES, AlgorithmName, Recipe
from rlhf_ray.config.schema.base import (
    EMBEDDED_CONSTITUTION,
    EMBEDDED_MODEL,
    EMBEDDED_TEMPLATES,
    DatasetSection,
    Fraction,
    ModelSection,
    NonNegative,
    OptimizerSection,
    Positive,
    Section,
)
from rlhf_ray.config.schema.checkpoint import CheckpointSection, KeepBestSection, seconds_left
from rlhf_ray.config.schema.constitution import ConstitutionSection
from rlhf_ray.config.schema.environments import EnvironmentSection
from rlhf_ray.config.schema.machinery import (
    ROLES,
    Attention,
    ClusterSection,
    EngineSection,
    FrozenRoleSection,
    Layout,
    LoggingSection,
    LoraSection,
    PlacementSection,
    RoleSection,
    SingleRoleSection,
    Strategy,
    SyncSection,
    TrainingSection,
    WandbSection,
)
from rlhf_ray.config.schema.online import KVOnUpdate, OnlineSection
from rlhf_ray.config.schema.preference import PreferenceAlgorithm, PreferenceSection
from rlhf_ray.config.schema.preferences import (
    Annotator,
    ConstitutionAnnotator,
    FileAnnotator,
    PreferencesSection,
    SimulatedAnnotator,
)
from rlhf_ray.config.schema.rewards import (
    EnsembleReward,
    ExactMatchReward,
    FormatReward,
    FunctionReward,
    HttpReward,
    JudgeReward,
    LengthReward,
    MathReward,
    ModelReward,
    ReasoningGymReward,
    RegexReward,
    Reward,
    TextVerifier,
)
from rlhf_ray.config.schema.run import STAGES, RunConfig, StageName, turn_names
from rlhf_ray.config.schema.supervised import PairsSection, RewardSection, SFTSection

__all__ = [
    "EMBEDDED_CONSTITUTION",
    "EMBEDDED_MODEL",
    "EMBEDDED_TEMPLATES",
    "RECIPES",
    "ROLES",
    "STAGES",
    "AlgorithmName",
    "Annotator",
    "Attention",
    "CheckpointSection",
    "ClusterSection",
    "ConstitutionAnnotator",
    "ConstitutionSection",
    "DatasetSection",
    "EngineSection",
    "EnsembleReward",
    "EnvironmentSection",
    "ExactMatchReward",
    "FileAnnotator",
    "FormatReward",
    "Fraction",
    "FrozenRoleSection",
    "FunctionReward",
    "HttpReward",
    "JudgeReward",
    "KVOnUpdate",
    "KeepBestSection",
    "Layout",
    "LengthReward",
    "LoggingSection",
    "LoraSection",
    "MathReward",
    "ModelReward",
    "ModelSection",
    "NonNegative",
    "OnlineSection",
    "OptimizerSection",
    "PairsSection",
    "PlacementSection",
    "Positive",
    "PreferenceAlgorithm",
    "PreferenceSection",
    "PreferencesSection",
    "ReasoningGymReward",
    "Recipe",
    "RegexReward",
    "Reward",
    "RewardSection",
    "RoleSection",
    "RunConfig",
    "SFTSection",
    "Section",
    "SimulatedAnnotator",
    "SingleRoleSection",
    "StageName",
    "Strategy",
    "SyncSection",
    "TextVerifier",
    "TrainingSection",
    "WandbSection",
    "seconds_left",
    "turn_names",
]
