"""Stages that learn from given examples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf_ray.config.schema.base import DatasetSection, ModelSection, OptimizerSection, Positive, Section


class SFTSection(Section):
    """Supervised fine-tuning on assistant turns."""

    model: ModelSection | None = None
    dataset: DatasetSection
    eval_dataset: DatasetSection | None = None
    num_epochs: Positive = 1
    max_steps: Positive | None = Field(None, description="stop early, whatever num_epochs says")
    batch_size: Positive = 16
    max_length: Positive = 512
    eval_every: Positive | None = None
    optimizer: OptimizerSection = OptimizerSection(learning_rate=2e-5)


class PairsSection(Section):
    """What every stage needs that learns from preference pairs."""

    model: ModelSection | None = None
    dataset: DatasetSection | None = None
    held_out: float = Field(0.15, gt=0, description="for evaluation: a fraction below 1, or a count")
    split_by: Literal["prompt", "first_turn"] = Field(
        "prompt", description="what pairs may not share across the split"
    )
    num_epochs: Positive = 1
    max_steps: Positive | None = None
    batch_size: Positive = Field(16, description="pairs an optimizer step")
    max_length: Positive = 512
    eval_every: Positive | None = None


class RewardSection(PairsSection):
    """Reward model from preference pairs: Bradley-Terry, -log sigmoid(r_chosen - r_rejected - margin).

    Where the dataset has a column `soft_label`, the loss is the cross entropy with that probability.
    """

    use_margin: bool = Field(False, description="use the dataset's column `margin`")
    center_rewards_coefficient: float = Field(0.0, ge=0)
    optimizer: OptimizerSection = OptimizerSection(learning_rate=1e-5, lr_scheduler="linear")
