"""Preference optimisation without a reward model: the policy learns from the pairs themselves."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_ray.config.schema.base import ModelSection, OptimizerSection
from rlhf_ray.config.schema.supervised import PairsSection

PreferenceAlgorithm = Literal["dpo", "ipo", "hinge", "orpo", "simpo", "kto"]

BETAS: dict[PreferenceAlgorithm, float] = {
    "dpo": 0.1,
    "ipo": 0.1,
    "hinge": 0.1,
    "orpo": 0.1,
    "simpo": 2.0,
    "kto": 0.1,
}
"""beta where none is written: of the papers' main experiments; hinge shares the scale of dpo."""

USED_BY: dict[str, tuple[PreferenceAlgorithm, ...]] = {
    "reference": ("dpo", "ipo", "hinge", "kto"),
    "cache_reference": ("dpo", "ipo", "hinge", "kto"),
    "label_smoothing": ("dpo", "ipo", "hinge"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Key -> the algorithms that look at it; a key that is not here, all do."""


class PreferenceSection(PairsSection):
    """Direct preference optimisation and its relatives; see `rlhf_ray.algorithms.preference_optimisation`.

    `kto` learns from single answers with a `label`: a dataset of pairs becomes two answers a pair, and
    `batch_size` counts answers. Rows with a `soft_label` below 1 need dpo, ipo or hinge.

    beta: strength of the pull to the reference (dpo, hinge, kto), tau (ipo), lambda (orpo), scale of the
        reward (simpo).
    label_smoothing: the probability that a label is wrong; with dpo this is conservative DPO.
    cache_reference: the reference's log-probs are computed once before the first step and kept in the
        stage's folder, so that the reference takes no memory during training. Otherwise it answers in every
        step.
    """

    algorithm: PreferenceAlgorithm = "dpo"
    reference: ModelSection | None = Field(None, description="default: the model that training starts from")
    beta: float | None = Field(None, gt=0, description="default: 0.1; simpo 2.0")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    simpo_gamma: float = Field(1.0, ge=0, description="margin of the reward that simpo asks for")
    desirable_weight: float = Field(1.0, gt=0)
    undesirable_weight: float = Field(1.0, gt=0)
    cache_reference: bool = True
    optimizer: OptimizerSection = OptimizerSection(learning_rate=1e-6, lr_scheduler="linear")

    @property
    def effective_beta(self) -> float:
        return BETAS[self.algorithm] if self.beta is None else self.beta

    @model_validator(mode="after")
    def _consistent(self) -> PreferenceSection:
        mistakes = []
        for key, owners in USED_BY.items():
            value = getattr(self, key)
            if self.algorithm not in owners and value != type(self).model_fields[key].default:
                shown = value.path if isinstance(value, ModelSection) else value
                mistakes.append(
                    f"{key}={shown}: {self.algorithm} does not use it; remove it, or use algorithm "
                    f"{' or '.join(owners)}"
                )
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self
