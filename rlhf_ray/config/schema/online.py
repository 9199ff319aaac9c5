"""Reinforcement learning."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from rlhf_ray.config.schema.algorithms import (
    MIN_GENERATIONS,
    RECIPES,
    USES_CRITIC,
    Aggregation,
    AlgorithmName,
    KLEstimator,
    KLPlacement,
    Recipe,
)
from rlhf_ray.config.schema.base import (
    DatasetSection,
    Fraction,
    ModelSection,
    NonNegative,
    OptimizerSection,
    Positive,
    Section,
)
from rlhf_ray.config.schema.environments import EnvironmentSection
from rlhf_ray.config.schema.rewards import Reward, judge_mistakes

KVOnUpdate = Literal["keep", "drop"]
OldLogprobs = Literal["forward", "update", "sampler"]


class OnlineSection(Section):
    """Reinforcement learning on the policy's own samples.

    Keys with the default null are the algorithm's own (`rlhf_ray/config/schema/algorithms.py` has the table).
    KL to the reference: `kl_placement: reward` subtracts kl_coef * k1 from every token's reward;
    `loss` adds kl_coef * (k2 or k3) to the loss. With `kl_target`, kl_coef adapts (Ziegler et al. 2019,
    section 2.2).

    importance_correction: of the difference between sampler and trainer. `token`, `sequence` and `geometric`
    say what a ratio is of; `truncate` cuts it at importance_cap, `mask` leaves out what is not in
    [1 / importance_cap, importance_cap].
    recompute_old_logprobs: the old policy's log-probs are the trainer's own, at the price of a forward pass
    where `old_logprobs` does not find them in the update; false takes the sampler's; the ratio of the loss is
    then that of trainer and sampler, and the correction applies to it.
    max_lag: training does not wait for generation, but is at most so many updates ahead of it
    (docs/asynchrony.md). Answers that vLLM is at when weights change go on with the new ones:
    `kv_on_update: keep` leaves what they have in the KV cache as it is, `drop` computes it anew.
    stragglers: `wait` trains on prompts in the order in which they were drawn; `drop` on those that are
    answered first, and gives up what would become older than max_lag. Its prompts come again.
    oversample: with `drop`, this many times prompts_per_step are sampled for a step, and the last are given
    up.
    advantage_function, policy_loss_function: functions of your own, `module:name`, in place of the
    algorithm's (docs/algorithms.md).
    critic_init, critic_warmup_steps, critic_optimizer, lam, cliprange_value: for algorithms with a critic.
    """

    algorithm: AlgorithmName = "ppo"
    advantage_function: str | None = None
    policy_loss_function: str | None = None
    model: ModelSection | None = None
    reference: ModelSection | None = Field(None, description="default: the model that training starts from")
    dataset: DatasetSection
    eval_dataset: DatasetSection | None = None
    rewards: tuple[Reward, ...] = Field((), description="at least one, unless there is an environment")
    environment: EnvironmentSection | None = Field(None, description="null: one answer to each prompt")

    num_steps: Positive
    prompts_per_step: Positive = 64
    num_generations: Positive = 1
    max_completion_length: Positive = Field(
        64, description="tokens of an answer; with an environment, of each"
    )
    max_prompt_length: Positive = 512
    max_lag: NonNegative = Field(
        0, description="versions by which the weights that sample may be behind those in training"
    )
    kv_on_update: KVOnUpdate = "keep"
    stragglers: Literal["wait", "drop"] = "wait"
    oversample: float = Field(1.0, ge=1, le=4, description="times as many prompts as a step trains on")
    temperature: float = Field(1.0, gt=0)

    num_ppo_epochs: Positive = 1
    num_mini_batches: Positive = 1
    cliprange: float | None = Field(None, gt=0)
    cliprange_high: float | None = Field(
        None, gt=0, description="upper side; null is the algorithm's own, or cliprange where that is given"
    )
    cliprange_value: float | None = Field(0.2, gt=0, description="null switches value clipping off")
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    entropy_coef: float = Field(0.0, ge=0)
    loss_aggregation: Aggregation | None = None

    kl_coef: float | None = Field(None, ge=0)
    kl_placement: KLPlacement | None = None
    kl_estimator: KLEstimator | None = None
    kl_target: float | None = Field(None, gt=0, description="nats a sequence")
    kl_horizon: Positive = Field(10_000, description="samples over which the adaptive kl_coef moves")
    track_kl: bool = Field(
        True, description="keep a reference to measure the KL even where kl_coef is 0; false saves its memory"
    )

    importance_correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"
    ] = "token_truncate"
    importance_cap: float = Field(2.0, gt=1)
    recompute_old_logprobs: bool = True

    dynamic_sampling: bool | None = None
    max_sampling_rounds: Positive = Field(8, description="of dynamic sampling, in one step")
    overlong_buffer: Fraction | None = None
    missing_eos_penalty: float = Field(0.0, ge=0)
    reward_clip: float | None = Field(None, gt=0)
    normalize_rewards: bool = Field(False, description="by the running standard deviation")
    whiten_rewards: bool = False
    whiten_advantages: bool | None = None

    critic_init: Literal["reward", "policy"] = "reward"
    critic_warmup_steps: NonNegative = Field(0, description="first steps that train only the critic")
    optimizer: OptimizerSection = OptimizerSection(learning_rate=3e-6)
    critic_optimizer: OptimizerSection = OptimizerSection(learning_rate=1e-5)

    eval_every: Positive | None = None

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.num_generations

    @property
    def spare_prompts(self) -> int:
        """In flight beyond the batches that are trained on."""
        return round((self.oversample - 1) * self.prompts_per_step)

    @property
    def max_response_length(self) -> int:
        """Tokens after the prompt."""
        return self.environment.max_episode_length if self.environment else self.max_completion_length

    @property
    def reward_names(self) -> list[str]:
        """Of the environment, where there is one, and of the sources."""
        own = ["environment"] if self.environment is not None else []
        return [*own, *[reward.name for reward in self.rewards]]

    @property
    def uses_critic(self) -> bool:
        return self.algorithm in USES_CRITIC

    @property
    def old_logprobs(self) -> OldLogprobs:
        """Where those of the policy before the update come from: a forward pass of their own, the sampler, or
        the update itself, whose only optimizer step begins with just that policy. The update comes too late
        where rewards or values need them; and an episode's have to be separated from what is not sampled."""
        if not self.recompute_old_logprobs:
            return "sampler"
        is_one_step = self.num_ppo_epochs == self.num_mini_batches == 1
        in_reward = self.recipe.kl_placement == "reward" and self.recipe.kl_coef > 0
        is_early = in_reward or self.uses_critic or self.environment is not None
        return "update" if is_one_step and not is_early else "forward"

    @property
    def uses_reward_model(self) -> bool:
        return any(reward.type in ("model", "ensemble") for reward in self.rewards)

    @property
    def uses_reference(self) -> bool:
        return self.track_kl or self.recipe.kl_coef > 0

    @property
    def recipe(self) -> Recipe:
        """The algorithm's settings with this section's in their place."""
        own = RECIPES[self.algorithm]
        placement = self.kl_placement or own.kl_placement
        # An estimator belongs to its place: moving the KL to the other place changes it too.
        usual: KLEstimator = "k1" if placement == "reward" else "k3"
        estimator = own.kl_estimator if placement == own.kl_placement else usual
        given = {name: getattr(self, name) for name in vars(own) if getattr(self, name) is not None}
        if self.cliprange is not None:
            given.setdefault("cliprange_high", self.cliprange)
        return replace(own, **{"kl_placement": placement, "kl_estimator": estimator, **given})

    @model_validator(mode="after")
    def _consistent(self) -> OnlineSection:
        mistakes = [
            *self._reward_mistakes(),
            *self._algorithm_mistakes(),
            *self._kl_mistakes(),
            *self._critic_mistakes(),
            *self._lag_mistakes(),
        ]
        if self.samples_per_step % self.num_mini_batches:
            mistakes.append(
                f"num_mini_batches={self.num_mini_batches}: does not divide "
                f"prompts_per_step * num_generations = {self.samples_per_step}"
            )
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def _reward_mistakes(self) -> list[str]:
        mistakes = []
        if not self.rewards and self.environment is None:
            mistakes.append("rewards=[]: must be a list with at least 1 entry")
        elif self.environment is None and all(reward.weight == 0 for reward in self.rewards):
            mistakes.append("rewards: every weight is 0, so there is nothing to train on")
        names = self.reward_names
        if len(set(names)) != len(names):
            mistakes.append(f"rewards: names must differ, these do not: {', '.join(names)}")
        return mistakes + judge_mistakes(self.rewards)

    def _algorithm_mistakes(self) -> list[str]:
        mistakes = []
        needed = 1 if self.advantage_function else MIN_GENERATIONS[self.algorithm]
        by: str = self.algorithm
        if self.recipe.dynamic_sampling and needed < 2:
            needed, by = 2, "dynamic_sampling"
        if self.num_generations < needed:
            mistakes.append(
                f"num_generations={self.num_generations}: {by} compares the answers to a prompt "
                f"and needs at least {needed}"
            )
        if self.algorithm == "remax" and self.recipe.dynamic_sampling:
            mistakes.append(
                "dynamic_sampling: remax compares each answer with the greedy one and learns from every "
                "prompt; leave it out"
            )
        if self.algorithm == "raft" and not self.recompute_old_logprobs:
            mistakes.append(
                "recompute_old_logprobs=false: the loss of raft has no ratio that could stand for the "
                "correction; leave it out"
            )
        elif not self.recompute_old_logprobs and self.importance_correction == "none":
            mistakes.append(
                "recompute_old_logprobs=false: without the trainer's own log-probs the difference between "
                "sampler and trainer has to be bounded; set importance_correction, token_truncate for example"
            )
        if self.whiten_rewards and not self.uses_critic:
            mistakes.append(
                "whiten_rewards: what it adds grows with the length of the answer, and without a critic "
                "answers are compared; leave it out, or use whiten_advantages"
            )
        if self.kl_target is not None and self.recipe.kl_coef == 0:
            mistakes.append("kl_target: kl_coef is 0, and would stay so; give kl_coef a value to start from")
        return mistakes

    def _kl_mistakes(self) -> list[str]:
        mistakes = []
        recipe = self.recipe
        if recipe.kl_placement == "reward" and recipe.kl_estimator != "k1":
            mistakes.append(
                f"kl_estimator={recipe.kl_estimator}: in the reward only k1 is unbiased; "
                "use k1, or kl_placement: loss"
            )
        if recipe.kl_placement == "loss" and recipe.kl_estimator == "k1":
            mistakes.append(
                "kl_estimator=k1: its gradient in the loss does not depend on the reference (it is zero in "
                "expectation); use k2 or k3, or kl_placement: reward"
            )
        if self.kl_target is not None and self.samples_per_step >= 5 * self.kl_horizon:
            mistakes.append(
                f"kl_horizon={self.kl_horizon}: so short that kl_coef could fall below 0 in one step; "
                f"use more than {self.samples_per_step // 5}"
            )
        return mistakes

    def _lag_mistakes(self) -> list[str]:
        if self.stragglers == "wait" and self.oversample > 1:
            return [
                f"oversample={self.oversample}: what is sampled beyond prompts_per_step is given up; set "
                "stragglers: drop, or leave it out"
            ]
        if self.stragglers == "drop" and not self.max_lag and not self.spare_prompts:
            return [
                "stragglers=drop: every prompt that is sampled is needed; set max_lag, or raise oversample, "
                "or leave it out"
            ]
        return []

    def _critic_mistakes(self) -> list[str]:
        if not self.uses_critic:  # comparing algorithms is changing one line, whatever is said of a critic
            return []
        mistakes = []
        if self.critic_init == "reward" and not self.uses_reward_model:
            mistakes.append(
                "critic_init=reward: none of the rewards is of type model or ensemble; "
                "use critic_init: policy"
            )
        if self.critic_warmup_steps >= self.num_steps:
            mistakes.append(
                f"critic_warmup_steps={self.critic_warmup_steps}: the policy would never be trained in "
                f"num_steps={self.num_steps}; use fewer"
            )
        return mistakes
