"""One file a stage: its data, its roles on the cluster, and the loop that drives them."""

from __future__ import annotations

from collections.abc import Callable

from launch.stages.constitution import run_constitution
from launch.stages.context import StageContext
from launch.stages.online import run_online
from launch.stages.preference import run_preference
from launch.stages.preferences import run_preferences
from launch.stages.reward import run_reward
from launch.stages.sft import run_sft
from rlhf_ray.config.schema import StageName
from rlhf_ray.types import Metrics

STAGE_RUNNERS: dict[StageName, Callable[[StageContext], Metrics]] = {
    "sft": run_sft,
    "constitution": run_constitution,
    "preferences": run_preferences,
    "reward": run_reward,
    "preference": run_preference,
    "online": run_online,
}
"""Each leaves the stage's artefacts in its folder and returns the final metrics."""
