"""Reinforcement learning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_ray.config.schema.base import (
    DatasetSection,
    ModelSection,
    NonNegative,
    OptimizerSection,
    Positive,
    Section,
)
from rlhf_ray.config.schema.rewards import Reward, judge_mistakes


class OnlineSection(Section):
    """Reinforcement learning on the policy's own samples: PPO with a critic.

    KL to the reference: `kl_placement: reward` subtracts kl_coef * k1 from every token's reward;
    `loss` adds kl_coef * (k2 or k3) to the loss. With `kl_target`, kl_coef adapts (Ziegler et al. 2019,
    section 2.2).
    """

    algorithm: Literal["ppo"] = "ppo"
    model: ModelSection | None = None
    reference: ModelSection | None = Field(None, description="default: the model that training starts from")
    dataset: DatasetSection
    eval_dataset: DatasetSection | None = None
    rewards: tuple[Reward, ...] = Field(min_length=1)

    num_steps: Positive
    prompts_per_step: Positive = 64
    num_generations: Positive = 1
    max_completion_length: Positive = 64
    max_prompt_length: Positive = 512
    temperature: float = Field(1.0, gt=0)

    num_ppo_epochs: Positive = 1
    num_mini_batches: Positive = 1
    cliprange: float = Field(0.2, gt=0)
    cliprange_value: float | None = Field(0.2, gt=0, description="null switches value clipping off")
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    entropy_coef: float = Field(0.0, ge=0)
    loss_aggregation: Literal["token", "sequence"] = Field(
        "token",
        description="mean over all tokens of the batch, or mean over sequences of each one's token mean",
    )

    kl_coef: float = Field(0.05, ge=0)
    kl_placement: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_target: float | None = Field(None, gt=0, description="nats a sequence")
    kl_horizon: Positive = Field(10_000, description="samples over which the adaptive kl_coef moves")

    missing_eos_penalty: float = Field(0.0, ge=0)
    reward_clip: float | None = Field(None, gt=0)
    normalize_rewards: bool = Field(False, description="by the running standard deviation")
    whiten_rewards: bool = False
    whiten_advantages: bool = True

    critic_init: Literal["reward", "policy"] = "reward"
    critic_warmup_steps: NonNegative = Field(0, description="first steps that train only the critic")
    optimizer: OptimizerSection = OptimizerSection(learning_rate=3e-6)
    critic_optimizer: OptimizerSection = OptimizerSection(learning_rate=1e-5)

    eval_every: Positive | None = None

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.num_generations

    @model_validator(mode="after")
    def _consistent(self) -> OnlineSection:
        mistakes = []
        if self.kl_placement == "reward" and self.kl_estimator != "k1":
            mistakes.append(
                f"kl_estimator={self.kl_estimator}: in the reward only k1 is unbiased; "
                "use k1, or kl_placement: loss"
            )
        if self.kl_placement == "loss" and self.kl_estimator == "k1":
            mistakes.append(
                "kl_estimator=k1: its gradient in the loss does not depend on the reference (it is zero in "
                "expectation); use k2 or k3, or kl_placement: reward"
            )
        if self.samples_per_step % self.num_mini_batches:
            mistakes.append(
                f"num_mini_batches={self.num_mini_batches}: does not divide "
                f"prompts_per_step * num_generations = {self.samples_per_step}"
            )
        if self.critic_init == "reward" and not any(r.type in ("model", "ensemble") for r in self.rewards):
            mistakes.append(
                "critic_init=reward: none of the rewards is of type model or ensemble; "
                "use critic_init: policy"
            )
        if all(reward.weight == 0 for reward in self.rewards):
            mistakes.append("rewards: every weight is 0, so there is nothing to train on")
        if self.critic_warmup_steps >= self.num_steps:
            mistakes.append(
                f"critic_warmup_steps={self.critic_warmup_steps}: the policy would never be trained in "
                f"num_steps={self.num_steps}; use fewer"
            )
        if self.kl_target is not None and self.samples_per_step >= 5 * self.kl_horizon:
            mistakes.append(
                f"kl_horizon={self.kl_horizon}: so short that kl_coef could fall below 0 in one step; "
                f"use more than {self.samples_per_step // 5}"
            )
        names = [reward.name for reward in self.rewards]
        if len(set(names)) != len(names):
            mistakes.append(f"rewards: names must differ, these do not: {', '.join(names)}")
        mistakes += judge_mistakes(self.rewards)
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self
