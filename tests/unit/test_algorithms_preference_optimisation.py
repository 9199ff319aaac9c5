"""Losses of preference optimisation: numbers by hand, gradients against plain formulas, soft labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.metrics import finalise, merge
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
from rlhf_ray.config.schema.preference import BETAS, USED_BY, PreferenceAlgorithm
from rlhf_ray.types import Metrics

PAIRWISE = {name: row for name, row in PREFERENCE_ALGORITHMS.items() if isinstance(row, PairAlgorithm)}
LENGTHS = torch.tensor([[2.0, 4.0, 3.0], [5.0, 1.0, 3.0]], dtype=torch.float64)


def test_the_table_and_the_schema_agree() -> None:
    assert {name for name, row in PREFERENCE_ALGORITHMS.items() if row.needs_reference} == set(
        USED_BY["reference"]
    )
    assert {name for name, row in PREFERENCE_ALGORITHMS.items() if row.takes_soft_labels} == set(
        USED_BY["label_smoothing"]
    )
    assert PREFERENCE_ALGORITHMS.keys() == BETAS.keys() == set(get_args(PreferenceAlgorithm))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def one_pair(
    chosen: float, rejected: float, ref: tuple[float, float] = (0, 0), lengths: tuple[int, int] = (1, 1)
) -> PairLogprobs:
    sides = [
        AnswerLogprobs(*(torch.tensor([float(x)], dtype=torch.float64) for x in side))
        for side in zip((chosen, rejected), ref, lengths, strict=True)
    ]
    return PairLogprobs(sides[0], sides[1], torch.ones(1, dtype=torch.float64))


def loss_of(name: str, pairs: PairLogprobs, spec: PairLossSpec) -> tuple[float, Metrics]:
    loss, metrics = pair_loss(PAIRWISE[name], pairs, spec)
    return loss.item(), finalise(metrics)


# log pi - log pi_ref is 0.5 for the answer that was chosen, -1.5 for the other: a lead of 2.
LEAD_OF_TWO = one_pair(-4.0, -6.5, ref=(-4.5, -5.0), lengths=(2, 5))


@pytest.mark.parametrize(
    ("name", "spec", "expected"),
    [
        ("dpo", PairLossSpec(0.3), -math.log(sigmoid(0.6))),
        ("dpo", PairLossSpec(0.3, 0.1), -0.9 * math.log(sigmoid(0.6)) - 0.1 * math.log(sigmoid(-0.6))),
        # Means over 2 and 5 tokens: 0.25 - (-0.3) = 0.55, and the target is 1 / (2 * 0.5) = 1.
        ("ipo", PairLossSpec(0.5), 0.45**2),
        ("ipo", PairLossSpec(0.5, 0.2), 0.8 * 0.45**2 + 0.2 * 1.55**2),
        ("hinge", PairLossSpec(0.3), 0.4),
        ("hinge", PairLossSpec(0.6), 0.0),
        ("hinge", PairLossSpec(0.3, 0.25), 0.75 * 0.4 + 0.25 * 1.6),
        # Means over tokens: -2 and -1.3.
        ("simpo", PairLossSpec(2.0, gamma=0.5), -math.log(sigmoid(2 * -0.7 - 0.5))),
        (
            "orpo",
            PairLossSpec(0.3),
            2.0
            - 0.3
            * math.log(
                sigmoid(
                    math.log(math.exp(-2) / (1 - math.exp(-2)))
                    - math.log(math.exp(-1.3) / (1 - math.exp(-1.3)))
                )
            ),
        ),
    ],
)
def test_losses_by_hand(name: str, spec: PairLossSpec, expected: float) -> None:
    loss, metrics = loss_of(name, LEAD_OF_TWO, spec)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert metrics["preference/loss"] == pytest.approx(expected, rel=1e-12)


def test_metrics_by_hand() -> None:
    _, metrics = loss_of("dpo", LEAD_OF_TWO, PairLossSpec(0.3))
    assert metrics == pytest.approx(
        {
            "preference/loss": -math.log(sigmoid(0.6)),
            "rewards/chosen": 0.15,
            "rewards/rejected": -0.45,
            "rewards/margins": 0.6,
            "rewards/accuracies": 1.0,
            "logps/chosen": -4.0,
            "logps/rejected": -6.5,
        }
    )
    _, metrics = loss_of("simpo", LEAD_OF_TWO, PairLossSpec(2.0, gamma=0.5))
    assert (metrics["rewards/chosen"], metrics["logps/chosen"]) == (-4.0, -2.0)
    assert (metrics["rewards/rejected"], metrics["logps/rejected"]) == (-2.6, -1.3)
    assert metrics["rewards/accuracies"] == 0.0


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge"])
def test_at_the_reference_nothing_is_preferred(name: str) -> None:
    loss, metrics = loss_of(name, one_pair(-3, -7, ref=(-3, -7), lengths=(2, 3)), PairLossSpec(0.5))
    assert loss == {"dpo": math.log(2), "ipo": 1.0, "hinge": 1.0}[name]
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == metrics["rewards/margins"] == 0.0
    assert metrics["rewards/accuracies"] == 0.5


def random_pairs(soft: bool = False) -> tuple[PairLogprobs, list[Tensor]]:
    """Three pairs of log-probs, float64, and the two tensors that a gradient goes to."""
    draws = torch.randn((4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs()
    leaves = [(-1 - draws[i]).requires_grad_() for i in (0, 1)]
    sides = [AnswerLogprobs(leaves[i], -1 - draws[2 + i], LENGTHS[i]) for i in (0, 1)]
    labels = torch.tensor([0.6, 0.8, 0.95] if soft else [1.0, 1.0, 1.0], dtype=torch.float64)
    return PairLogprobs(sides[0], sides[1], labels), leaves


def plain(name: str, pairs: PairLogprobs, spec: PairLossSpec) -> Tensor:
    """The papers' formulas for certain labels, term by term."""
    c, r = pairs.chosen, pairs.rejected
    lead = (c.policy - c.reference) - (r.policy - r.reference)
    if name == "dpo":
        return -torch.log(1 / (1 + torch.exp(-spec.beta * lead)))
    if name == "hinge":
        return torch.maximum(torch.zeros(3), 1 - spec.beta * lead)
    if name == "ipo":
        h = (c.policy - c.reference) / c.lengths - (r.policy - r.reference) / r.lengths
        return (h - 0.5 / spec.beta) ** 2
    p_c, p_r = torch.exp(c.policy / c.lengths), torch.exp(r.policy / r.lengths)
    if name == "simpo":
        logits = spec.beta * torch.log(p_c) - spec.beta * torch.log(p_r) - spec.gamma
        return -torch.log(1 / (1 + torch.exp(-logits)))
    ratio = (p_c / (1 - p_c)) / (p_r / (1 - p_r))
    return -torch.log(p_c) - spec.beta * torch.log(ratio / (1 + ratio))


@pytest.mark.parametrize("name", PAIRWISE)
def test_gradients_are_those_of_the_plain_formula(name: str) -> None:
    spec = PairLossSpec(0.7, gamma=0.4)
    pairs, leaves = random_pairs()
    loss, _ = pair_loss(PAIRWISE[name], pairs, spec)
    expected = plain(name, pairs, spec).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, row in PAIRWISE.items() if row.takes_soft_labels])
def test_a_soft_label_is_the_expectation_over_both_orders(name: str) -> None:
    pairs, _ = random_pairs(soft=True)
    certain = torch.ones(3, dtype=torch.float64)
    losses = PAIRWISE[name].loss
    for smoothing in (0.0, 0.15):
        there = losses(PairLogprobs(pairs.chosen, pairs.rejected, certain), PairLossSpec(0.7))
        back = losses(PairLogprobs(pairs.rejected, pairs.chosen, certain), PairLossSpec(0.7))
        q = pairs.soft_label * (1 - smoothing) + (1 - pairs.soft_label) * smoothing
        found = losses(pairs, PairLossSpec(0.7, smoothing))
        torch.testing.assert_close(found, q * there + (1 - q) * back, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "optimum"),
    [
        ("dpo", lambda q, beta: math.log(q / (1 - q)) / beta),
        ("ipo", lambda q, beta: (2 * q - 1) / (2 * beta)),
    ],
)
def test_the_best_lead_is_finite(name: str, optimum: Callable[[float, float], float]) -> None:
    lead = torch.tensor([optimum(0.7, 0.4)], dtype=torch.float64, requires_grad=True)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    pairs = PairLogprobs(AnswerLogprobs(lead, zero, one), AnswerLogprobs(zero, zero, one), 0.7 * one)
    PAIRWISE[name].loss(pairs, PairLossSpec(0.4)).sum().backward()
    assert lead.grad is not None and abs(lead.grad.item()) < 1e-12


def test_a_certain_answer_has_large_odds_and_no_infinite_gradient() -> None:
    mean = torch.tensor([-0.5, -1e-5, 0.0], requires_grad=True)
    odds = log_odds(mean)
    assert odds[0].item() == pytest.approx(math.log(math.exp(-0.5) / (1 - math.exp(-0.5))), rel=1e-6)
    assert odds[1].item() == pytest.approx(math.log(1e5), rel=1e-5)
    assert torch.isfinite(odds).all()
    odds.sum().backward()
    assert mean.grad is not None and torch.isfinite(mean.grad).all() and mean.grad[2] == 0


ANSWERS = AnswerLogprobs(
    torch.tensor([-3.0, -5.0, -2.0]), torch.tensor([-4.0, -5.5, -1.0]), torch.tensor([2.0, 3.0, 1.0])
)
IS_DESIRABLE = torch.tensor([True, False, True])


def test_kto_by_hand() -> None:
    """Rewards are 1, 0.5 and -1; z_0 is 0.25."""
    loss, metrics = kto_loss(ANSWERS, IS_DESIRABLE, KTOSpec(0.2, 1.5, 0.5, 0.25))
    losses = [
        1.5 * (1 - sigmoid(0.2 * (1 - 0.25))),
        0.5 * (1 - sigmoid(0.2 * (0.25 - 0.5))),
        1.5 * (1 - sigmoid(0.2 * (-1 - 0.25))),
    ]
    assert loss.item() == pytest.approx(sum(losses), rel=1e-6)
    assert finalise(metrics) == pytest.approx(
        {
            "preference/loss": sum(losses) / 3,
            "rewards/chosen": 0.0,
            "rewards/rejected": 0.1,
            "logps/chosen": -2.5,
            "logps/rejected": -5.0,
        },
        abs=1e-7,
    )


def test_the_kl_estimate_is_a_mean_and_never_negative() -> None:
    assert kl_estimate(ANSWERS) == pytest.approx(0.5 / 3)
    less_likely = AnswerLogprobs(ANSWERS.policy - 1, ANSWERS.reference, ANSWERS.lengths)
    assert kl_estimate(less_likely) == 0.0


def test_kto_gradient_lifts_the_desirable_only() -> None:
    policy = ANSWERS.policy.clone().requires_grad_()
    answers = AnswerLogprobs(policy, ANSWERS.reference, ANSWERS.lengths)
    kto_loss(answers, IS_DESIRABLE, KTOSpec(0.2, 1.5, 0.5, 0.25))[0].backward()
    assert policy.grad is not None
    slopes = [
        -sign * weight * 0.2 * sigmoid(z) * sigmoid(-z)
        for sign, weight, z in ((1, 1.5, 0.15), (-1, 0.5, 0.05), (1, 1.5, -0.25))
    ]
    assert policy.grad.tolist() == pytest.approx(slopes, rel=1e-5)


@pytest.mark.parametrize("name", [*PAIRWISE, "kto"])
@pytest.mark.parametrize("split", [[[0, 1], [2]], [[2], [], [1], [0]]])
def test_sums_do_not_depend_on_the_split(name: str, split: list[list[int]]) -> None:
    def part(rows: list[int]) -> tuple[Tensor, list[Tensor], Metrics]:
        pairs, leaves = random_pairs(soft=PREFERENCE_ALGORITHMS[name].takes_soft_labels)
        index = torch.tensor(rows, dtype=torch.long)
        c, r = (
            AnswerLogprobs(side.policy[index], side.reference[index], side.lengths[index])
            for side in (pairs.chosen, pairs.rejected)
        )
        if name == "kto":
            loss, metrics = kto_loss(
                c, torch.tensor([True, False, False])[index], KTOSpec(0.5, 1.0, 2.0, 0.1)
            )
        else:
            some = PairLogprobs(c, r, pairs.soft_label[index])
            loss, metrics = pair_loss(PAIRWISE[name], some, PairLossSpec(0.7, gamma=0.4))
        loss.backward()
        gradients = [leaf.grad if leaf.grad is not None else torch.zeros(3) for leaf in leaves]
        return loss.detach(), gradients, metrics  # type: ignore[return-value]

    whole, *parts = [part(rows) for rows in ([0, 1, 2], *split)]
    assert sum(loss.item() for loss, _, _ in parts) == pytest.approx(whole[0].item(), rel=1e-12)
    for side in (0, 1):
        summed = torch.stack([gradients[side] for _, gradients, _ in parts]).sum(0)
        torch.testing.assert_close(summed, whole[1][side], rtol=1e-12, atol=1e-14, check_dtype=False)
    merged = finalise(merge([metrics for _, _, metrics in parts]))  # type: ignore[misc]
    assert merged == pytest.approx(finalise(whole[2]), rel=1e-12)  # type: ignore[arg-type]
