"""The algorithms of the online stage, each a pair of pure functions: advantages, and the policy's loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.algorithms.advantages import gae
from rlhf_ray.algorithms.group_advantages import (
    group_relative,
    is_best_of_group,
    leave_one_out,
    on_every_token,
    rewards_to_go,
)
from rlhf_ray.algorithms.metrics import MetricSums
from rlhf_ray.algorithms.policy_losses import (
    PolicyLossSpec,
    PolicyTokens,
    cispo_policy_loss,
    gspo_policy_loss,
    likelihood_loss,
    ppo_policy_loss,
)
from rlhf_ray.algorithms.rows import row_sums


@dataclass(frozen=True)
class AdvantageInputs:
    """What an advantage function may look at: the whole batch of a step.

    Fields:
        rewards: [R] of each token, from `token_rewards`.
        values: [R] of the critic; 0 where there is none.
        offsets: [B + 1] rows in the two above.
        group_ids: [B] prompt of each row.
        gamma, lam: discount, and trace decay.
        baseline: [B] reward of the greedy answer to each row's prompt, where the algorithm asks for it.
    """

    rewards: Tensor
    values: Tensor
    offsets: Tensor
    group_ids: Tensor
    gamma: float
    lam: float
    baseline: Tensor | None = None


@dataclass(frozen=True)
class Advantages:
    """
    Fields:
        advantages: [R]. returns: [R] what a critic learns; None where there is none.
        is_trained: [R] bool, False where a token is to be left out of the loss; None trains all.
    """

    advantages: Tensor
    returns: Tensor | None = None
    is_trained: Tensor | None = None


AdvantageFunction = Callable[[AdvantageInputs], Advantages]
PolicyLossFunction = Callable[[PolicyTokens, PolicyLossSpec], tuple[Tensor, MetricSums]]


def gae_advantages(inputs: AdvantageInputs) -> Advantages:
    """From the critic's values (Schulman et al. 2016)."""
    return Advantages(*gae(inputs.rewards, inputs.values, inputs.offsets, inputs.gamma, inputs.lam))


def grpo_advantages(inputs: AdvantageInputs) -> Advantages:
    """Of the sequence, relative to its group, in units of the group's spread (Shao et al. 2024)."""
    return _of_sequences(inputs, lambda rewards: group_relative(rewards, inputs.group_ids, scale_by_std=True))


def centred_advantages(inputs: AdvantageInputs) -> Advantages:
    """Of the sequence, less the mean of its group (Liu et al. 2025; Hu et al. 2025, REINFORCE++-baseline)."""
    return _of_sequences(
        inputs, lambda rewards: group_relative(rewards, inputs.group_ids, scale_by_std=False)
    )


def rloo_advantages(inputs: AdvantageInputs) -> Advantages:
    """Of the sequence, less the mean of the others in its group (Ahmadian et al. 2024)."""
    return _of_sequences(inputs, lambda rewards: leave_one_out(rewards, inputs.group_ids))


def reinforce_advantages(inputs: AdvantageInputs) -> Advantages:
    """Rewards to go, token by token (Hu et al. 2025, REINFORCE++, equation 6)."""
    return Advantages(rewards_to_go(inputs.rewards, inputs.offsets, inputs.gamma))


def remax_advantages(inputs: AdvantageInputs) -> Advantages:
    """Rewards to go, less the reward of the greedy answer (Li et al. 2024, ReMax, algorithm 1)."""
    assert inputs.baseline is not None
    to_go = rewards_to_go(inputs.rewards, inputs.offsets, inputs.gamma)
    return Advantages(to_go - on_every_token(inputs.baseline.to(to_go.dtype), inputs.offsets))


def best_of_group(inputs: AdvantageInputs) -> Advantages:
    """1 for the best answer to each prompt; the others are not trained on (Dong et al. 2023, RAFT)."""
    rewards = row_sums(inputs.rewards, inputs.offsets)
    is_best = on_every_token(is_best_of_group(rewards, inputs.group_ids), inputs.offsets)
    return Advantages(is_best.to(inputs.rewards.dtype), is_trained=is_best)


def _of_sequences(inputs: AdvantageInputs, per_row: Callable[[Tensor], Tensor]) -> Advantages:
    rewards = row_sums(inputs.rewards, inputs.offsets)
    return Advantages(on_every_token(per_row(rewards), inputs.offsets))


@dataclass(frozen=True)
class Algorithm:
    """A row of the table. What else tells algorithms apart are settings: `config.schema.RECIPES`.

    Fields:
        needs_greedy: whether the advantages compare with the greedy answer to the prompt.
    """

    advantages: AdvantageFunction
    policy_loss: PolicyLossFunction = ppo_policy_loss
    needs_greedy: bool = False


ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(gae_advantages),
    "grpo": Algorithm(grpo_advantages),
    "dr_grpo": Algorithm(centred_advantages),
    "dapo": Algorithm(grpo_advantages),
    "gspo": Algorithm(grpo_advantages, gspo_policy_loss),
    "cispo": Algorithm(grpo_advantages, cispo_policy_loss),
    "rloo": Algorithm(rloo_advantages),
    "reinforce_pp": Algorithm(reinforce_advantages),
    "reinforce_pp_baseline": Algorithm(centred_advantages),
    "remax": Algorithm(remax_advantages, needs_greedy=True),
    "raft": Algorithm(best_of_group, likelihood_loss),
}
"""By the name that the configuration gives."""


def trained_mask(advantages: Advantages) -> Tensor:
    """[R] bool."""
    if advantages.is_trained is not None:
        return advantages.is_trained
    return torch.ones_like(advantages.advantages, dtype=torch.bool)
