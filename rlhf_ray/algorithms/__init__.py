"""The mathematics: pure functions over tensors, and the table of the algorithms composed of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rlhf_ray.algorithms.advantages import gae
from rlhf_ray.algorithms.metrics import MetricSums
from rlhf_ray.algorithms.policy_losses import PolicyLossSpec, PolicyTokens, ppo_policy_loss


@dataclass(frozen=True)
class AdvantageInputs:
    """What an advantage function may look at: the whole batch of a step.

    Fields:
        rewards: [R] of each token, from `token_rewards`.
        values: [R] of the critic; 0 where there is none.
        offsets: [B + 1] rows in the two above.
        group_ids: [B] prompt of each row.
        gamma, lam: discount, and trace decay.
    """

    rewards: Tensor
    values: Tensor
    offsets: Tensor
    group_ids: Tensor
    gamma: float
    lam: float


def gae_advantages(inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """[R] advantages and returns from the critic's values."""
    return gae(inputs.rewards, inputs.values, inputs.offsets, inputs.gamma, inputs.lam)


@dataclass(frozen=True)
class Algorithm:
    """A row of the table.

    Fields:
        advantages: -> [R] advantages and returns.
        policy_loss: -> the loss as a sum over tokens, and metrics.
        needs_critic: whether values are learned.
        min_num_generations: samples a prompt that the advantages need at least.
    """

    advantages: Callable[[AdvantageInputs], tuple[Tensor, Tensor]]
    policy_loss: Callable[[PolicyTokens, PolicyLossSpec], tuple[Tensor, MetricSums]]
    needs_critic: bool
    min_num_generations: int = 1


ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(advantages=gae_advantages, policy_loss=ppo_policy_loss, needs_critic=True),
}
"""The algorithms of the online stage, by the name that the configuration gives."""
