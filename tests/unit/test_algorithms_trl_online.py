"""The algorithms after PPO, number for number as TRL's trainers compute them, where TRL is installed.

TRL's methods run as they are, on stand-ins for the trainer that hold what the methods read. In a
process of their own, as in `test_algorithms_trl`.
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

from rlhf_ray.algorithms import ALGORITHMS, AdvantageInputs
from rlhf_ray.algorithms.advantages import RewardShaping, token_rewards
from rlhf_ray.algorithms.aggregation import loss_denominator, loss_weights
from rlhf_ray.algorithms.correction import Correction, Level, Mode, importance_weights
from rlhf_ray.algorithms.policy_losses import KLInLoss, PolicyLossSpec, PolicyTokens
from rlhf_ray.config.schema import RECIPES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")

LENGTHS = [5, 2, 7, 4, 1, 3]
WIDTH = 7
LONGEST = 9
"""Longer than any of the answers, as max_completion_length may be."""
IS_TOKEN = torch.arange(WIDTH)[None, :] < torch.tensor(LENGTHS)[:, None]
OFFSETS = torch.tensor([0, 5, 7, 14, 18, 19, 22])
IS_TRAINED = torch.ones(22, dtype=torch.bool)
CAP = 1.5
KL = 0.3
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    process_index=0,
    sync_gradients=False,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)
Columns = dict[str, Tensor]


def columns() -> Columns:
    """[B, T] log-probs that are far enough apart that every clip and cap is met."""
    draws = torch.randn((4, len(LENGTHS), WIDTH), generator=torch.Generator().manual_seed(2)).double()
    return {
        "logprobs": (draws[0] - 3).requires_grad_(),
        "old_logprobs": draws[0] - 3 + 0.5 * draws[1],
        "ref_logprobs": draws[0] - 3 + 0.5 * draws[2],
        "sampler_logprobs": draws[0] - 3 + 0.5 * draws[1] + 0.3 * draws[3],
    }


class NoModel(nn.Module):
    is_gradient_checkpointing = False


def trl_trainer(loss_type: str, *logprobs: Tensor, **options: object) -> Any:
    """`logprobs` are what its forward passes give, one after another."""
    passes = iter(logprobs)
    return SimpleNamespace(
        **{
            "_get_per_token_logps_and_entropies": lambda *_, **__: (
                (found := next(passes)),
                torch.zeros_like(found),
                None,
            ),
            "model": NoModel(),
            "args": SimpleNamespace(
                delta=None,
                use_bias_correction_kl=False,
                steps_per_generation=1,
                gradient_checkpointing_kwargs=None,
                per_device_train_batch_size=len(LENGTHS),
                gradient_accumulation_steps=1,
            ),
            "accelerator": ACCELERATOR,
            "loss_type": loss_type,
            "beta": KL,
            "epsilon_low": 0.1,
            "epsilon_high": 0.25,
            "_entropy_bonus_enabled": False,
            "aux_loss_enabled": False,
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "importance_sampling_level": "token",
            "use_vllm": False,
            "vllm_importance_sampling_correction": True,
            "current_gradient_accumulation_steps": 1,
            "max_completion_length": LONGEST,
            "_metrics": {"train": defaultdict(list)},
            **options,
        }
    )


def trl_inputs(found: Columns, advantages: Tensor) -> dict[str, Tensor]:
    prompts = torch.zeros((len(LENGTHS), 1), dtype=torch.long)
    return {
        "prompt_ids": prompts,
        "prompt_mask": prompts,
        "completion_ids": torch.zeros((len(LENGTHS), WIDTH), dtype=torch.long),
        "completion_mask": IS_TOKEN.long(),
        "advantages": advantages,
        "old_per_token_logps": found["old_logprobs"],
        "ref_per_token_logps": found["ref_logprobs"],
        "old_logps": (found["old_logprobs"] * IS_TOKEN).sum(1),
        "num_items_in_batch": IS_TOKEN.sum(),
    }


# policy losses


@pytest.mark.parametrize(
    ("algorithm", "loss_type", "level"),
    [
        ("grpo", "grpo", "token"),
        ("dr_grpo", "dr_grpo", "token"),
        ("dapo", "dapo", "token"),
        ("gspo", "grpo", "sequence"),
        ("cispo", "cispo", "token"),
    ],
)
def test_policy_loss(trl_process: Executor, algorithm: str, loss_type: str, level: str) -> None:
    trl_process.submit(compare_policy_loss, algorithm, loss_type, level).result(timeout=300)


def compare_policy_loss(algorithm: str, loss_type: str, level: str) -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer

    found = columns()
    advantages = torch.tensor([1.0, -0.5, 0.3, -2.0, 0.7, -0.1], dtype=torch.float64)
    # TRL's epsilon_high is for CISPO the bound itself, 1 + cliprange_high here, and has no lower side: with
    # cliprange 1, as MiniMax's paper has it, neither has this one.
    bounds = {"epsilon_high": 1.25} if algorithm == "cispo" else {}
    lower = 1.0 if algorithm == "cispo" else 0.1
    trainer = trl_trainer(loss_type, found["logprobs"], importance_sampling_level=level, **bounds)
    expected = GRPOTrainer._compute_loss(trainer, None, trl_inputs(found, advantages))
    (expected_gradient,) = torch.autograd.grad(expected, found["logprobs"])

    loss = our_loss(algorithm, found, advantages, PolicyLossSpec(lower, 0.25, kl=KLInLoss(KL, "k3")))
    (gradient,) = torch.autograd.grad(loss, found["logprobs"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)
    assert gradient.abs().max() > 1e-3


def our_loss(
    algorithm: str, found: Columns, advantages: Tensor, spec: PolicyLossSpec, weights: Tensor | None = None
) -> Tensor:
    aggregation = RECIPES[algorithm].loss_aggregation  # type: ignore[index]
    tokens = PolicyTokens(
        logprobs=found["logprobs"][IS_TOKEN],
        entropy=torch.zeros(22, dtype=torch.float64),
        old_logprobs=found["old_logprobs"][IS_TOKEN],
        ref_logprobs=found["ref_logprobs"][IS_TOKEN],
        advantages=advantages.repeat_interleave(torch.tensor(LENGTHS)),
        weights=loss_weights(OFFSETS, IS_TRAINED, aggregation),
        importance_weights=weights,
        offsets=OFFSETS,
    )
    loss, _ = ALGORITHMS[algorithm].policy_loss(tokens, spec)
    return loss / loss_denominator(OFFSETS, IS_TRAINED, aggregation, LONGEST)


def test_cispo_may_have_a_lower_side_that_trl_has_not() -> None:
    """A ratio of 0.5 under cliprange 0.1 weighs 0.9 here; TRL, without a lower side, would have 0.5."""
    tokens = PolicyTokens(
        torch.tensor([0.5]).log(), *[torch.zeros(1)] * 3, advantages=torch.ones(1), weights=torch.ones(1)
    )
    spec = PolicyLossSpec(0.1, 0.25)
    assert ALGORITHMS["cispo"].policy_loss(tokens, spec)[0].item() == pytest.approx(0.9 * 0.6931472)


def test_gradient_of_rloo(trl_process: Executor) -> None:
    trl_process.submit(compare_rloo_gradient).result(timeout=300)


def compare_rloo_gradient() -> None:
    """-A grad log pi(y | x), the sum over a sequence's tokens and the mean over sequences: Ahmadian et al.
    2024, equation 9. The constant that the sum is divided by is ours.

    On policy: after the first update TRL clips the ratio of the whole sequence, and this library that of each
    token.
    """
    from trl.trainer.rloo_trainer import RLOOTrainer

    found = columns()
    found["old_logprobs"] = found["logprobs"].detach()
    advantages = torch.tensor([1.0, -0.5, 0.3, -2.0, 0.7, -0.1], dtype=torch.float64)
    trainer = trl_trainer("rloo", found["logprobs"])
    expected = RLOOTrainer._compute_loss(trainer, None, trl_inputs(found, advantages))
    (expected_gradient,) = torch.autograd.grad(expected, found["logprobs"])
    (gradient,) = torch.autograd.grad(
        our_loss("rloo", found, advantages, PolicyLossSpec(0.2, 0.2)), found["logprobs"]
    )
    torch.testing.assert_close(gradient * LONGEST, expected_gradient, rtol=1e-5, atol=1e-8)


# advantages, and what corrects for the sampler

REWARDS = torch.tensor([1.0, 0.25, -2.0, 3.0, 3.0, 0.5])
GROUP_IDS = torch.tensor([8, 8, 8, 3, 3, 3])


def scored(trainer_class: Any, **options: object) -> dict[str, Tensor]:
    """What TRL makes of two prompts' three answers each, given their rewards and log-probs."""
    found = columns()
    completions = [[5] * length for length in LENGTHS]
    sampler = [row[:length].tolist() for row, length in zip(found["sampler_logprobs"], LENGTHS, strict=True)]
    texts = [""] * len(LENGTHS)
    whole = ([[1]] * len(LENGTHS), completions, None, texts, sampler, None, None, None)
    trainer = trl_trainer(
        "grpo",
        found["old_logprobs"],
        found["ref_logprobs"],
        _generate=lambda _: whole if trainer_class.__name__ == "GRPOTrainer" else (whole[0], whole[1], texts),
        _calculate_rewards=lambda *_: REWARDS[:, None],
        **{
            "beta": 0.0,
            "environment_factories": None,
            "environments": None,
            "tools": [],
            "_tokenizer": SimpleNamespace(pad_token_id=0),
            "pad_to_multiple_of": None,
            "mask_truncated_completions": False,
            "num_iterations": 1,
            "reward_weights": torch.ones(1),
            "reward_funcs": [None],
            "reward_func_names": ["r"],
            "num_generations": 3,
            "multi_objective_aggregation": "sum_then_normalize",
            "reward_clip_range": None,
            "normalize_advantages": False,
            "ref_model": NoModel(),
            "_logs": defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
            "_pending_extra_logs": defaultdict(list),
            "_pending_metrics": defaultdict(list),
            **options,
        },
    )
    result: dict[str, Tensor] = trainer_class._generate_and_score_completions(trainer, [{"prompt": ""}] * 6)
    return result


def sequence_advantages(algorithm: str, kl_coef: float = 0.0) -> list[float]:
    """Of one token a row: all have the same."""
    found = columns()
    shaped = token_rewards(
        REWARDS,
        torch.ones(6, dtype=torch.bool),
        found["old_logprobs"][IS_TOKEN],
        found["ref_logprobs"][IS_TOKEN],
        OFFSETS,
        RewardShaping(kl_coef),
    )
    inputs = AdvantageInputs(
        shaped.rewards, torch.zeros_like(shaped.rewards), OFFSETS, GROUP_IDS, gamma=1.0, lam=1.0
    )
    advantages: list[float] = ALGORITHMS[algorithm].advantages(inputs).advantages[OFFSETS[:-1]].tolist()
    return advantages


@pytest.mark.parametrize(("algorithm", "scale_rewards"), [("grpo", "group"), ("dr_grpo", "none")])
def test_group_advantages(trl_process: Executor, algorithm: str, scale_rewards: str) -> None:
    trl_process.submit(compare_group_advantages, algorithm, scale_rewards).result(timeout=300)


def compare_group_advantages(algorithm: str, scale_rewards: str) -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer

    expected = scored(GRPOTrainer, scale_rewards=scale_rewards)["advantages"]
    assert sequence_advantages(algorithm) == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_leave_one_out_with_kl_in_the_reward(trl_process: Executor, kl_coef: float) -> None:
    trl_process.submit(compare_leave_one_out, kl_coef).result(timeout=300)


def compare_leave_one_out(kl_coef: float) -> None:
    from trl.trainer.rloo_trainer import RLOOTrainer

    expected = scored(RLOOTrainer, beta=kl_coef)["advantages"]
    assert sequence_advantages("rloo", kl_coef) == pytest.approx(expected.tolist(), rel=1e-5)
    assert (sequence_advantages("rloo", kl_coef) == sequence_advantages("rloo")) == (kl_coef == 0)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_correction(trl_process: Executor, level: Level, mode: Mode) -> None:
    trl_process.submit(compare_correction, level, mode).result(timeout=300)


def compare_correction(level: Level, mode: Mode) -> None:
    """The weights, and the loss that they multiply.

    A mask here has both bounds, 1 / cap and cap; TRL's default, without a lower one, keeps tokens that the
    trainer thinks far less likely than the sampler did. Given both bounds, TRL's is the same. Neither cuts a
    ratio from below when it truncates.
    """
    from trl.trainer.grpo_trainer import GRPOTrainer

    found = columns()
    options = {
        "use_vllm": True,
        "scale_rewards": "group",
        "vllm_importance_sampling_mode": f"{level}_{mode}",
        "vllm_importance_sampling_clip_min": 1 / CAP if mode == "mask" else None,
        "vllm_importance_sampling_clip_max": CAP,
    }
    output = scored(GRPOTrainer, **options)
    theirs = output["importance_sampling_ratio"].expand(-1, WIDTH)[IS_TOKEN]
    sides = (found["old_logprobs"][IS_TOKEN], found["sampler_logprobs"][IS_TOKEN])
    ours = importance_weights(*sides, OFFSETS, IS_TRAINED, Correction(level, mode, CAP))
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-6)
    assert (ours == 0).any() if mode == "mask" else (ours == CAP).any()
    assert ((ours > 0) & (ours < CAP)).any()
    if mode == "mask":
        no_lower_side = scored(GRPOTrainer, **{**options, "vllm_importance_sampling_clip_min": None})
        ratios = no_lower_side["importance_sampling_ratio"].expand(-1, WIDTH)[IS_TOKEN]
        assert ((ours == 0) & (ratios > 0) & (ratios < 1 / CAP)).any(), "a difference on purpose"

    trainer = trl_trainer("grpo", found["logprobs"], **options)
    advantages = output["advantages"].double()
    inputs = {**output, **trl_inputs(found, advantages)}
    expected = GRPOTrainer._compute_loss(trainer, None, inputs)
    (expected_gradient,) = torch.autograd.grad(expected, found["logprobs"])
    loss = our_loss("grpo", found, advantages, PolicyLossSpec(0.1, 0.25, kl=KLInLoss(KL, "k3")), ours)
    (gradient,) = torch.autograd.grad(loss, found["logprobs"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
