"""Preference optimisation against TRL's implementation of the same papers, where TRL is installed.

In a process of their own, since TRL imports vLLM and Ray if they are there.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_ray.algorithms.metrics import finalise
from rlhf_ray.algorithms.preference_optimisation import (
    PREFERENCE_ALGORITHMS,
    AnswerLogprobs,
    KTOSpec,
    PairAlgorithm,
    PairLogprobs,
    PairLossSpec,
    kl_estimate,
    kto_loss,
    log_odds,
    pair_loss,
)
from rlhf_ray.types import Metrics

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")

PROMPT, LENGTHS = 3, torch.tensor([5, 2, 7, 4, 3, 6])
IS_TOKEN = torch.arange(PROMPT + 7)[None, :] >= PROMPT
IS_TOKEN = IS_TOKEN & (torch.arange(PROMPT + 7)[None, :] < PROMPT + LENGTHS[:, None])
BETA = 0.3
TRLMetrics = dict[str, list[float]]


@pytest.fixture(scope="module")
def other_process() -> Iterator[Executor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


def draws(seed: int) -> Tensor:
    """[6, 9] float64, log-probs of the tokens after each row's first; 0 outside the answers."""
    noise = torch.randn((6, PROMPT + 6), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(IS_TOKEN[:, 1:], -noise.abs() - 0.1, 0.0)


def trainer(**attributes: object) -> tuple[Any, TRLMetrics]:
    metrics: dict[str, TRLMetrics] = {"train": defaultdict(list)}
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, num_processes=1)
    fake = SimpleNamespace(
        model=nn.Linear(1, 1).train(),
        accelerator=same,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics=metrics,
        **attributes,
    )
    return fake, metrics["train"]


def answering(logprobs: Tensor) -> Any:
    """A model that says these log-probs."""
    zeros = torch.zeros_like(logprobs)
    outputs = SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return lambda **_: outputs


def answers(logprobs: Tensor, reference: Tensor, rows: slice) -> AnswerLogprobs:
    return AnswerLogprobs(logprobs[rows].sum(1), reference[rows].sum(1), LENGTHS[rows].double())


def compare_with_dpo_trainer(name: str, loss_type: str) -> None:
    from trl.trainer.dpo_trainer import DPOTrainer

    logprobs, reference = draws(0).requires_grad_(), draws(1)
    fake, trl_metrics = trainer(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=0.0,
        use_weighting=False,
    )
    inputs = {
        "input_ids": torch.zeros_like(IS_TOKEN, dtype=torch.long),
        "attention_mask": torch.ones_like(IS_TOKEN),
        "completion_mask": IS_TOKEN.long(),
        "ref_chosen_logps": reference[:3].sum(1),
        "ref_rejected_logps": reference[3:].sum(1),
    }
    expected = DPOTrainer._compute_loss(fake, answering(logprobs), inputs, return_outputs=False)
    pairs = PairLogprobs(
        answers(logprobs, reference, slice(0, 3)),
        answers(logprobs, reference, slice(3, 6)),
        torch.ones(3, dtype=torch.float64),
    )
    row = PREFERENCE_ALGORITHMS[name]
    assert isinstance(row, PairAlgorithm)
    loss, sums = pair_loss(row, pairs, PairLossSpec(BETA))
    assert_equal(loss / 3, expected, logprobs)
    assert_metrics(finalise(sums), trl_metrics, ("chosen", "rejected", "margins", "accuracies"))


def compare_with_orpo_trainer() -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    # TRL computes the odds in float32.
    chosen, rejected = (-torch.rand((2, 9), generator=torch.Generator().manual_seed(0)) * 3).unbind()
    fake, _ = trainer(beta=BETA)
    rewards, _, _, ratio, odds = ORPOTrainer.odds_ratio_loss(fake, chosen, rejected)
    difference = log_odds(chosen) - log_odds(rejected)
    assert difference.mean().item() == pytest.approx(odds.item(), rel=1e-5)
    sides = [AnswerLogprobs(side * 4, side, torch.full((9,), 4.0)) for side in (chosen, rejected)]
    row = PREFERENCE_ALGORITHMS["orpo"]
    assert isinstance(row, PairAlgorithm)
    loss = row.loss(PairLogprobs(sides[0], sides[1], torch.ones(9)), PairLossSpec(BETA))
    torch.testing.assert_close(loss, -chosen - rewards, rtol=1e-5, atol=1e-6)
    assert ratio.item() == pytest.approx(((-chosen - loss) / BETA).mean().item(), rel=1e-5)


def compare_with_cpo_trainer(name: str, loss_type: str, smoothing: float) -> None:
    """SimPO; and, on log-ratios instead of log-probs, DPO with label smoothing."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    logprobs, reference = draws(2).requires_grad_(), draws(3)
    sides = [answers(logprobs, reference, rows) for rows in (slice(0, 3), slice(3, 6))]
    fake, _ = trainer(beta=BETA, alpha=0.0, loss_type=loss_type, simpo_gamma=0.4, label_smoothing=smoothing)
    theirs = [side.mean if name == "simpo" else side.log_ratio for side in sides]
    losses, chosen, rejected = CPOTrainer.cpo_loss(fake, *theirs)
    row = PREFERENCE_ALGORITHMS[name]
    assert isinstance(row, PairAlgorithm)
    pairs = PairLogprobs(sides[0], sides[1], torch.ones(3, dtype=torch.float64))
    spec = PairLossSpec(BETA, smoothing, 0.4 if name == "simpo" else 0.0)
    loss, sums = pair_loss(row, pairs, spec)
    assert_equal(loss, losses.sum(), logprobs)
    found = finalise(sums)
    assert found["rewards/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-9)
    assert found["rewards/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-9)


def compare_with_kto_trainer(lift: float) -> None:
    """lift: added to the policy's log-probs of mismatched answers, so that the estimate is above or at 0."""
    from trl.trainer.kto_trainer import KTOTrainer

    logprobs, reference = draws(4).requires_grad_(), draws(5)
    mismatched = AnswerLogprobs(draws(6).sum(1) + lift, draws(7).sum(1), LENGTHS.double())
    labels = torch.tensor([True, False, True, True, False, False])
    fake, trl_metrics = trainer(
        beta=BETA, loss_type="kto", calculate_KL=True, desirable_weight=1.3, undesirable_weight=0.7
    )
    fake._compute_kl_logps = lambda *_: mismatched.policy
    inputs = {
        "input_ids": torch.zeros_like(IS_TOKEN, dtype=torch.long),
        "attention_mask": torch.ones_like(IS_TOKEN),
        "completion_mask": IS_TOKEN.long(),
        "label": labels,
        "ref_logps": reference.sum(1),
        "ref_KL_logps": mismatched.reference,
    }
    expected = KTOTrainer._compute_loss(fake, answering(logprobs), inputs, return_outputs=False)
    kl = kl_estimate(mismatched)
    assert kl == pytest.approx(trl_metrics["kl"][0], rel=1e-9)
    assert (kl > 0) == (lift > 0)
    loss, sums = kto_loss(answers(logprobs, reference, slice(None)), labels, KTOSpec(BETA, 1.3, 0.7, kl))
    assert_equal(loss / 6, expected, logprobs)
    assert_metrics(finalise(sums), trl_metrics, ("chosen", "rejected"))


def assert_equal(loss: Tensor, expected: Tensor, leaf: Tensor) -> None:
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    ours, theirs = (torch.autograd.grad(each, leaf)[0] for each in (loss, expected))
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def assert_metrics(found: Metrics, trl: TRLMetrics, rewards: tuple[str, ...]) -> None:
    for name in (*(f"rewards/{name}" for name in rewards), "logps/chosen", "logps/rejected"):
        assert found[name] == pytest.approx(trl[name][0], rel=1e-6), name


@pytest.mark.parametrize(("name", "loss_type"), [("dpo", "sigmoid"), ("ipo", "ipo"), ("hinge", "hinge")])
def test_with_a_reference(other_process: Executor, name: str, loss_type: str) -> None:
    other_process.submit(compare_with_dpo_trainer, name, loss_type).result(timeout=300)


def test_orpo(other_process: Executor) -> None:
    other_process.submit(compare_with_orpo_trainer).result(timeout=300)


@pytest.mark.parametrize(
    ("name", "loss_type", "smoothing"), [("simpo", "simpo", 0.0), ("dpo", "sigmoid", 0.15)]
)
def test_without_a_reference(other_process: Executor, name: str, loss_type: str, smoothing: float) -> None:
    other_process.submit(compare_with_cpo_trainer, name, loss_type, smoothing).result(timeout=300)


@pytest.mark.parametrize("lift", [5.0, -5.0])
def test_kto(other_process: Executor, lift: float) -> None:
    other_process.submit(compare_with_kto_trainer, lift).result(timeout=300)
