"""The KL divergence to another policy, estimated from log-probs of sampled tokens, and its coefficient.

Estimators: J. Schulman, "Approximating KL divergence" (2020). Controller: Ziegler et al., "Fine-tuning
language models from human preferences" (2019), section 2.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from rlhf_ray.algorithms.metrics import MetricSum, MetricSums
from rlhf_ray.algorithms.rows import row_sums
from rlhf_ray.errors import CheckpointError, ConfigError

Estimator = Literal["k1", "k2", "k3"]


def kl_per_token(logprobs: Tensor, other_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """KL(pi || other) in nats, one estimate a token, for tokens that were sampled from pi.

    With d = log pi - log other:

    * k1 = d: unbiased, of either sign. Its gradient is zero in expectation (E[grad log pi] = 0) and does not
      depend on the other policy at all, so k1 belongs in the reward and never in the loss.
    * k2 = d^2 / 2: biased and never negative. Its expected gradient, E[d grad log pi], is that of
      KL(pi || other).
    * k3 = e^-d - 1 + d: unbiased and never negative. Its expected gradient, E[(1 - other / pi) grad log pi],
      is that of the other direction, KL(other || pi).

    The expectations are over tokens of the *current* pi; after several updates on the same samples they are
    approximate.

    Args:
        logprobs, other_logprobs: [R] of the sampled tokens, at the same temperature.
    """
    difference = logprobs - other_logprobs
    match estimator:
        case "k1":
            return difference
        case "k2":
            return difference.square() / 2
        case "k3":
            # expm1: near d = 0 the value is d^2 / 2, which e^-d - 1 would round away.
            return torch.expm1(-difference) + difference
    raise ValueError(f"kl_estimator={estimator}: expected k1, k2 or k3")


def reference_kl_metrics(logprobs: Tensor, ref_logprobs: Tensor, offsets: Tensor) -> MetricSums:
    """k1 to the reference, in nats: mean per token and mean per sequence. k3 per token, with less variance.

    Args:
        logprobs, ref_logprobs: [R]; offsets: [B + 1].
    """
    k1 = kl_per_token(logprobs, ref_logprobs, "k1")
    all_tokens = torch.ones_like(k1, dtype=torch.bool)
    per_sequence = row_sums(k1, offsets)
    return {
        "kl/per_token": MetricSum.mean(k1, all_tokens),
        "kl/per_token_k3": MetricSum.mean(kl_per_token(logprobs, ref_logprobs, "k3"), all_tokens),
        "kl/per_sequence": MetricSum.mean(per_sequence, torch.ones_like(per_sequence, dtype=torch.bool)),
    }


class KLController(Protocol):
    """Decides the coefficient on the KL to the reference."""

    @property
    def coef(self) -> float: ...

    def update(self, observed_kl: float, num_samples: int) -> None:
        """Learn of a step: the mean KL in nats a sequence over num_samples sequences."""
        ...

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: dict[str, float]) -> None: ...


@dataclass(frozen=True)
class FixedKLController:
    coef: float

    def update(self, observed_kl: float, num_samples: int) -> None:
        """A fixed coefficient does not move."""

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """
        Raises:
            CheckpointError: the state is that of an adaptive controller.
        """
        if state:
            raise CheckpointError(
                "online.kl_target=null: the checkpoint holds an adaptive kl_coef; set kl_target as "
                "it was when the run started, or start a new run"
            )


class AdaptiveKLController:
    """Proportional control of the coefficient, so that the KL a sequence stays near a target.

    e = clip((KL - target) / target, -0.2, 0.2);  coef <- coef * (1 + e * num_samples / horizon)

    Args:
        coef: where it starts.
        target: nats a sequence.
        horizon: samples; an error of e changes the coefficient by the factor 1 + e after this many.
    """

    MAX_ERROR = 0.2

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, observed_kl: float, num_samples: int) -> None:
        """
        Raises:
            ConfigError: the horizon is so short that one step could make the coefficient negative.
        """
        if not math.isfinite(observed_kl):
            raise ValueError(f"the KL of the last step is {observed_kl}; the coefficient cannot follow it")
        if self.MAX_ERROR * num_samples >= self.horizon:
            raise ConfigError(
                f"online.kl_horizon={self.horizon}: with {num_samples} samples a step the coefficient could "
                f"fall below 0 in one step; use more than {math.ceil(self.MAX_ERROR * num_samples)}"
            )
        error = (observed_kl - self.target) / self.target
        error = min(max(error, -self.MAX_ERROR), self.MAX_ERROR)
        self.coef *= 1 + error * num_samples / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """
        Raises:
            CheckpointError: the state is that of a fixed coefficient.
        """
        if "coef" not in state:
            raise CheckpointError(
                f"online.kl_target={self.target}: the checkpoint holds no adaptive kl_coef; set kl_target to "
                "null as when the run started, or start a new run"
            )
        self.coef = state["coef"]
