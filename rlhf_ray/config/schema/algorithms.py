"""What tells the online algorithms apart besides their functions: the settings of their papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AlgorithmName = Literal[
    "ppo",
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "raft",
]
Aggregation = Literal["token", "sequence", "constant"]
KLPlacement = Literal["reward", "loss"]
KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class Recipe:
    """Each entry is a key of `online` too, where null means the algorithm's own.

    Fields:
        kl_coef: 0 leaves the KL out of training; it is still measured.
        cliprange, cliprange_high: the ratio is clipped to [1 - cliprange, 1 + cliprange_high].
        loss_aggregation: `token` is the mean over all tokens of the batch, `sequence` the mean over sequences
            of each one's token mean, `constant` the sum over the batch's tokens divided by its number of
            sequences times max_completion_length.
        whiten_advantages: to zero mean and unit variance over the tokens of the batch.
        dynamic_sampling: prompts whose answers all got the same reward are replaced by others.
        overlong_buffer: share of max_completion_length over which, at the end, a penalty rises from 0 to 1.
    """

    kl_coef: float
    kl_placement: KLPlacement = "loss"
    kl_estimator: KLEstimator = "k3"
    cliprange: float = 0.2
    cliprange_high: float = 0.2
    loss_aggregation: Aggregation = "token"
    whiten_advantages: bool = False
    dynamic_sampling: bool = False
    overlong_buffer: float = 0.0


RECIPES: dict[AlgorithmName, Recipe] = {
    # Ouyang et al. 2022: KL in the reward, GAE, whitened advantages.
    "ppo": Recipe(kl_coef=0.05, kl_placement="reward", kl_estimator="k1", whiten_advantages=True),
    # Shao et al. 2024 (DeepSeekMath), equation 3 and section 4.2.
    "grpo": Recipe(kl_coef=0.04, loss_aggregation="sequence"),
    # Liu et al. 2025, "Understanding R1-Zero-like training": no division by length or spread, no KL.
    "dr_grpo": Recipe(kl_coef=0.0, loss_aggregation="constant"),
    # Yu et al. 2025, equation 8 and section 3: clip-higher, token mean, overlong shaping of a fifth.
    "dapo": Recipe(kl_coef=0.0, cliprange_high=0.28, dynamic_sampling=True, overlong_buffer=0.2),
    # Zheng et al. 2025, section 5.1: the ratio of a sequence is a geometric mean and stays very near 1.
    "gspo": Recipe(kl_coef=0.0, cliprange=3e-4, cliprange_high=4e-4, loss_aggregation="sequence"),
    # MiniMax 2025 (M1), equation 4; the upper bound is that of Khatri et al. 2025 (ScaleRL).
    "cispo": Recipe(kl_coef=0.0, cliprange=1.0, cliprange_high=4.0),
    # Ahmadian et al. 2024, equation 9: an answer is one action, its tokens are summed; KL in the reward.
    "rloo": Recipe(kl_coef=0.05, kl_placement="reward", kl_estimator="k1", loss_aggregation="constant"),
    # Hu et al. 2025 (REINFORCE++): equation 6, KL in the reward; with baseline, k2 in the loss.
    "reinforce_pp": Recipe(kl_coef=0.01, kl_placement="reward", kl_estimator="k1", whiten_advantages=True),
    "reinforce_pp_baseline": Recipe(kl_coef=0.01, kl_estimator="k2", whiten_advantages=True),
    # Li et al. 2024 (ReMax), algorithm 1: its tokens are summed; KL in the reward.
    "remax": Recipe(kl_coef=0.05, kl_placement="reward", kl_estimator="k1", loss_aggregation="constant"),
    # Dong et al. 2023 (RAFT): likelihood of the best of n.
    "raft": Recipe(kl_coef=0.0),
}

USES_CRITIC: frozenset[AlgorithmName] = frozenset({"ppo"})
MIN_GENERATIONS: dict[AlgorithmName, int] = {
    **dict.fromkeys(("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp_baseline", "raft"), 2),
    **dict.fromkeys(("ppo", "reinforce_pp", "remax"), 1),
}
"""Samples of a prompt that the advantages compare."""
