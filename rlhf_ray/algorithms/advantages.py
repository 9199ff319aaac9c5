"""From scores and values to advantages: reward shaping, generalised advantage estimation, normalisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.algorithms.kl import kl_per_token
from rlhf_ray.algorithms.rows import row_ids_of, row_sums

VARIANCE_FLOOR = 1e-8
"""Added to a variance before it divides, so that rounding noise around a constant stays small."""


@dataclass(frozen=True)
class RewardShaping:
    """
    Fields:
        kl_coef: times k1 to the reference is taken from each token's reward.
        missing_eos_penalty: taken from the score of a response that no EOS token ended.
        reward_clip: the score is clipped to [-reward_clip, reward_clip], before the penalties; None does not
            clip.
        overlong_buffer: over the last so many tokens before `max_length` a penalty rises from 0 to 1 (DAPO:
            Yu et al. 2025, equation 13).
    """

    kl_coef: float
    missing_eos_penalty: float = 0.0
    reward_clip: float | None = None
    overlong_buffer: int = 0
    max_length: int = 0


@dataclass(frozen=True)
class TokenRewards:
    """
    Fields:
        rewards: [R] what is trained on: the shaped score at each row's last token, minus the KL penalty
            everywhere.
        scores: [B] after clipping and the penalties.
        kl_penalty: [R] kl_coef * k1.
    """

    rewards: Tensor
    scores: Tensor
    kl_penalty: Tensor


def token_rewards(
    scores: Tensor,
    is_finished: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    offsets: Tensor,
    shaping: RewardShaping,
) -> TokenRewards:
    """Spread the score of each response over its tokens (Ziegler et al. 2019, equation 2, token by token).

    A row without tokens has nowhere to put its score and contributes nothing.

    Args:
        scores: [B]; is_finished: [B] bool, True where an EOS token ended the response.
        logprobs, ref_logprobs: [R], of the policy that sampled and of the reference.
        offsets: [B + 1].
    """
    if shaping.reward_clip is not None:
        scores = scores.clamp(-shaping.reward_clip, shaping.reward_clip)
    scores = scores - shaping.missing_eos_penalty * (~is_finished).to(scores.dtype)
    if shaping.overlong_buffer:
        excess = offsets.diff() - (shaping.max_length - shaping.overlong_buffer)
        scores = scores - (excess / shaping.overlong_buffer).clamp(0, 1).to(scores.dtype)
    k1 = kl_per_token(logprobs, ref_logprobs, "k1")
    # A log-prob may be -inf, and 0 * inf is NaN.
    kl_penalty = shaping.kl_coef * k1 if shaping.kl_coef else torch.zeros_like(k1)
    has_tokens = offsets.diff() > 0
    last_tokens = offsets[1:][has_tokens] - 1
    rewards = -kl_penalty
    rewards = rewards.index_add(0, last_tokens, scores[has_tokens].to(rewards.dtype))
    return TokenRewards(rewards, scores, kl_penalty)


def move_turn_rewards(rewards: Tensor, turn_rewards: Tensor, offsets: Tensor) -> Tensor:
    """[R] rewards whose share of single turns is moved from each row's last token to the end of its turn.

    The sum of a row stays: what clipping and penalties took from the score is missing at the last token.

    Args:
        rewards: [R], with the score of whole rows at their last tokens; turn_rewards: [R] parts of the score.
        offsets: [B + 1].
    """
    has_tokens = offsets.diff() > 0
    last_tokens = offsets[1:][has_tokens] - 1
    sums = row_sums(turn_rewards, offsets)[has_tokens]
    return rewards.index_add(0, last_tokens, -sums) + turn_rewards


def gae(rewards: Tensor, values: Tensor, offsets: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16), each row by itself.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  after the last token V = A = 0.

    Args:
        rewards, values: [R]; offsets: [B + 1].

    Returns:
        advantages [R], and returns [R] = advantages + values.
    """
    lengths = offsets.diff()
    row_ids = row_ids_of(offsets)
    columns = torch.arange(len(rewards), device=rewards.device) - offsets[row_ids]
    num_columns = int(lengths.max()) if len(lengths) else 0
    # Zeros to the right of a row are what the equation wants after its last token, so no mask is needed.
    rewards_BT = rewards.new_zeros(len(lengths), num_columns)
    values_BT = values.new_zeros(len(lengths), num_columns + 1)
    rewards_BT[row_ids, columns] = rewards
    values_BT[row_ids, columns] = values
    deltas_BT = rewards_BT + gamma * values_BT[:, 1:] - values_BT[:, :-1]
    advantages_BT = torch.zeros_like(deltas_BT)
    following_B = rewards.new_zeros(len(lengths))
    for t in reversed(range(num_columns)):
        following_B = deltas_BT[:, t] + gamma * lam * following_B
        advantages_BT[:, t] = following_B
    advantages = advantages_BT[row_ids, columns]
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale x [N] to unit variance over the entries where mask is True; entries where it is False become 0.

    (x - mean) / sqrt(var + 1e-8), plus the mean if it is not to be shifted; var has N - 1 in its
    denominator. One entry, or none, becomes 0 (its mean).
    """
    mask_count = mask.sum()
    used = torch.where(mask, x, torch.zeros_like(x)).double()
    mean = used.sum() / mask_count.clamp(min=1)
    centred = torch.where(mask, used - mean, torch.zeros_like(used))
    variance = centred.square().sum() / (mask_count - 1).clamp(min=1)
    whitened = centred * torch.rsqrt(variance + VARIANCE_FLOOR)
    if not shift_mean:
        whitened = torch.where(mask, whitened + mean, whitened)
    return whitened.to(x.dtype)


class RunningMeanStd:
    """Mean and standard deviation of everything seen so far (merged as in Chan, Golub and LeVeque 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0  # sum of squared distances from the mean

    def update(self, x: Tensor) -> None:
        """Take in x [N]; N may be 0."""
        if len(x) == 0:
            return
        x = x.double()
        if not torch.isfinite(x).all():
            raise ValueError("a running mean would stay NaN or infinite for ever after such a value")
        mean = x.mean().item()
        total = self.count + len(x)
        shift = mean - self.mean
        self._squares += (x - mean).square().sum().item() + shift**2 * self.count * len(x) / total
        self.mean += shift * len(x) / total
        self.count = total

    @property
    def std(self) -> float:
        """With count - 1 in the denominator; 0 for fewer than two entries."""
        return math.sqrt(self._squares / (self.count - 1)) if self.count > 1 else 0.0

    def scale(self, x: Tensor) -> Tensor:
        """x / std; x as it is while everything seen was the same number."""
        is_constant = self.std <= 1e-6 * max(1.0, abs(self.mean))
        return x if is_constant else x / self.std

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self._squares = int(state["count"]), state["mean"], state["squares"]
