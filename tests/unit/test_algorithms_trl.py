"""The same numbers as TRL's implementation of the same formulas, where TRL is installed.

TRL imports vLLM and Ray if they are there, which must not happen to the process of the other tests: the
comparisons run in one of their own.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from concurrent.futures import Executor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_ray.algorithms.aggregation import Aggregation, loss_denominator, loss_weights
from rlhf_ray.algorithms.metrics import finalise
from rlhf_ray.algorithms.policy_losses import KLInLoss, PolicyLossSpec, PolicyTokens, ppo_policy_loss
from rlhf_ray.algorithms.preference_losses import bradley_terry_loss

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")

LENGTHS = [5, 2, 7, 4]
IS_TOKEN = torch.arange(7)[None, :] < torch.tensor(LENGTHS)[:, None]
OFFSETS = torch.tensor([0, 5, 7, 14, 18])
ACCELERATOR = SimpleNamespace(
    num_processes=1,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)


def trl_grpo_loss(
    loss_type: str, columns: dict[str, Tensor], advantages: Tensor, entropy_coef: float
) -> tuple[Tensor, dict[str, list[float]]]:
    """TRL's policy loss on padded rows, with a model that answers with the given log-probs and entropies."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    args = SimpleNamespace(delta=None, use_bias_correction_kl=False)
    metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
    trainer: Any = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (columns["logprobs"], columns["entropy"], None),
        model=nn.Linear(1, 1).train(),
        args=args,
        accelerator=SimpleNamespace(sync_gradients=False, **vars(ACCELERATOR)),
        loss_type=loss_type,
        beta=0.3,
        epsilon_low=0.1,
        epsilon_high=0.25,
        entropy_coef=entropy_coef,
        _entropy_bonus_enabled=entropy_coef > 0,
        use_adaptive_entropy=False,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _metrics=metrics,
    )
    prompts = torch.zeros((4, 1), dtype=torch.long)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": prompts,
        "completion_ids": torch.zeros((4, 7), dtype=torch.long),
        "completion_mask": IS_TOKEN.long(),
        "advantages": advantages,
        "old_per_token_logps": columns["old_logprobs"],
        "ref_per_token_logps": columns["ref_logprobs"],
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs), metrics["train"]


@pytest.mark.parametrize(
    ("loss_type", "aggregation", "entropy_coef"), [("bnpo", "token", 0.07), ("grpo", "sequence", 0.0)]
)
def test_policy_loss(
    trl_process: Executor, loss_type: str, aggregation: Aggregation, entropy_coef: float
) -> None:
    trl_process.submit(compare_policy_loss, loss_type, aggregation, entropy_coef).result(timeout=300)


@pytest.mark.parametrize("coefficient", [0.0, 0.02])
def test_reward_model_loss(trl_process: Executor, coefficient: float) -> None:
    trl_process.submit(compare_reward_model_loss, coefficient).result(timeout=300)


def compare_policy_loss(loss_type: str, aggregation: Aggregation, entropy_coef: float) -> None:
    draws = torch.randn((5, 4, 7), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns = {
        "logprobs": (draws[0] - 3).requires_grad_(),
        "entropy": draws[1].abs().requires_grad_(),
        "old_logprobs": draws[0] - 3 + 0.3 * draws[2],
        "ref_logprobs": draws[0] - 3 + 0.5 * draws[3],
    }
    advantages = draws[4, :, 0]
    leaves = [columns["logprobs"], columns["entropy"]]
    expected, trl_metrics = trl_grpo_loss(loss_type, columns, advantages, entropy_coef)
    expected_gradients = torch.autograd.grad(expected, leaves, allow_unused=True)

    is_trained = torch.ones(18, dtype=torch.bool)
    tokens = PolicyTokens(
        **{name: column[IS_TOKEN] for name, column in columns.items()},
        advantages=advantages.repeat_interleave(torch.tensor(LENGTHS)),
        weights=loss_weights(OFFSETS, is_trained, aggregation),
    )
    spec = PolicyLossSpec(0.1, 0.25, entropy_coef, KLInLoss(0.3, "k3"))
    loss, metrics = ppo_policy_loss(tokens, spec)
    loss = loss / loss_denominator(OFFSETS, is_trained, aggregation, max_length=7)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradients[0], expected_gradients[0], rtol=1e-6, atol=1e-9)
    if entropy_coef:
        torch.testing.assert_close(gradients[1], expected_gradients[1], rtol=1e-6, atol=1e-9)
    values = finalise(metrics)
    assert values["policy/clip_ratio/low"] == pytest.approx(trl_metrics["clip_ratio/low_mean"][0])
    assert values["policy/clip_ratio/high"] == pytest.approx(trl_metrics["clip_ratio/high_mean"][0])
    assert values["kl/in_loss"] == pytest.approx(0.3 * trl_metrics["kl"][0])


def compare_reward_model_loss(coefficient: float) -> None:
    from trl.trainer.reward_trainer import RewardTrainer

    chosen, rejected = torch.randn((2, 9), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    margin = torch.rand(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = torch.cat([chosen, rejected])[:, None].requires_grad_()
    metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
    trainer: Any = SimpleNamespace(
        model=nn.Linear(1, 1).train(),
        args=SimpleNamespace(center_rewards_coefficient=coefficient),
        accelerator=ACCELERATOR,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics=metrics,
    )
    inputs = {"margin": margin, "attention_mask": torch.ones((18, 1))}

    def model(**_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=logits)

    expected = RewardTrainer.compute_loss(trainer, model, inputs)
    loss, sums = bradley_terry_loss(logits[:9, 0], logits[9:, 0], margin, torch.ones(9), coefficient)
    assert loss.item() / 9 == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss / 9, logits), torch.autograd.grad(expected, logits))
    values = finalise(sums)
    assert values["reward/accuracy"] == pytest.approx(metrics["train"]["accuracy"][0])
    assert values["reward/margin"] == pytest.approx(metrics["train"]["margin"][0])
