"""The functions and constants that a section of the configuration asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from rlhf_ray.algorithms.correction import Correction, Level, Mode
from rlhf_ray.algorithms.policy_losses import KLInLoss, PolicyLossSpec
from rlhf_ray.algorithms.table import ALGORITHMS, AdvantageFunction, Algorithm, PolicyLossFunction
from rlhf_ray.config.schema import OnlineSection
from rlhf_ray.rewards.functions import import_function


def algorithm_of(section: OnlineSection) -> Algorithm:
    """The row of the table, with the person's own functions in place of its own.

    Raises:
        ConfigError: such a function cannot be imported.
    """
    row = ALGORITHMS[section.algorithm]
    if section.advantage_function is not None:
        own = cast(AdvantageFunction, import_function(section.advantage_function))
        row = replace(row, advantages=own)
    if section.policy_loss_function is not None:
        row = replace(
            row, policy_loss=cast(PolicyLossFunction, import_function(section.policy_loss_function))
        )
    return row


def policy_loss_spec(section: OnlineSection, kl_coef: float) -> PolicyLossSpec:
    """kl_coef: this step's coefficient; used here where the KL belongs in the loss."""
    recipe = section.recipe
    kl = None
    if recipe.kl_placement == "loss" and kl_coef > 0:
        assert recipe.kl_estimator != "k1"  # the schema refuses it
        kl = KLInLoss(kl_coef, recipe.kl_estimator)
    return PolicyLossSpec(recipe.cliprange, recipe.cliprange_high, entropy_coef=section.entropy_coef, kl=kl)


def correction_of(section: OnlineSection) -> Correction | None:
    if section.importance_correction == "none":
        return None
    level, _, mode = section.importance_correction.partition("_")
    return Correction(cast(Level, level), cast(Mode, mode), section.importance_cap)
