"""The losses of the algorithms after PPO: numbers by hand, gradients, and a slow reference row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms import ALGORITHMS
from rlhf_ray.algorithms.aggregation import loss_weights
from rlhf_ray.algorithms.metrics import MetricSums, finalise
from rlhf_ray.algorithms.policy_losses import (
    KLInLoss,
    PolicyLossSpec,
    PolicyTokens,
    cispo_policy_loss,
    gspo_policy_loss,
    likelihood_loss,
    ppo_policy_loss,
)

Loss = Callable[[PolicyTokens, PolicyLossSpec], tuple[Tensor, MetricSums]]
PLAIN = PolicyLossSpec(cliprange_low=0.2, cliprange_high=0.3)
FULL = PolicyLossSpec(0.2, 0.3, entropy_coef=0.1, kl=KLInLoss(0.5, "k3"))
LOSSES: dict[str, Loss] = {
    "ppo": ppo_policy_loss,
    "gspo": gspo_policy_loss,
    "cispo": cispo_policy_loss,
    "raft": likelihood_loss,
}
EVERY = pytest.mark.parametrize("name", LOSSES)
LENGTHS = [4, 1, 6, 3]
OFFSETS = torch.tensor([0, 4, 5, 11, 14])
IS_TRAINED = torch.tensor([1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
"""The last row has nothing to train."""
FIELDS = ("logprobs", "entropy", "old_logprobs", "ref_logprobs", "advantages", "importance_weights")


def random_tokens(seed: int = 0) -> PolicyTokens:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn((6, 14), generator=generator, dtype=torch.float64)
    return PolicyTokens(
        logprobs=draws[0] - 2 + 0.4 * draws[1],
        entropy=draws[2].abs(),
        old_logprobs=draws[0] - 2,
        ref_logprobs=draws[0] - 2 + 0.4 * draws[3],
        advantages=draws[4],
        weights=loss_weights(OFFSETS, IS_TRAINED, "sequence").double(),
        importance_weights=draws[5].exp(),
        offsets=OFFSETS,
    )


def tokens_of(ratios: list[float], advantages: list[float], lengths: list[int]) -> PolicyTokens:
    """Old log-probs -1, weight 1 everywhere."""
    log_ratios = torch.tensor(ratios, dtype=torch.float64).log()
    ones = torch.ones_like(log_ratios)
    return PolicyTokens(
        logprobs=(log_ratios - 1).requires_grad_(),
        entropy=ones,
        old_logprobs=-ones,
        ref_logprobs=-ones,
        advantages=torch.tensor(advantages, dtype=torch.float64),
        weights=ones,
        offsets=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]),
    )


def gradient_of(loss: Tensor, tokens: PolicyTokens) -> list[float]:
    return [float(x) for x in torch.autograd.grad(loss, tokens.logprobs)[0]]


def test_gspo_by_hand() -> None:
    """Geometric means: row 0, sqrt(0.5 * 4.5) = 1.5; row 1, 1.2; row 2, sqrt(0.25 * 1) = 0.5.

    Row 0, A = 2: clipped at 1.3, no gradient. Row 1, A = -1: -1.2, gradient 1.2 for its one token. Row 2,
    A = -3: the smaller is -3 * 0.8, no gradient. Then each token of row 3, A = 1 and s = sqrt(2 / 2) = 1,
    has a loss of -1, and each gets from both losses half of the ratio's gradient: -1.
    """
    tokens = tokens_of([0.5, 4.5, 1.2, 0.25, 1.0, 2.0, 0.5], [2, 2, -1, -3, -3, 1, 1], [2, 1, 2, 2])
    loss, metrics = gspo_policy_loss(tokens, PLAIN)
    assert loss.item() == pytest.approx(-2 * 2.6 + 1.2 + 2 * 2.4 - 2)
    assert gradient_of(loss, tokens) == pytest.approx([0, 0, 1.2, 0, 0, -1, -1], abs=1e-12)
    values = finalise(metrics)
    assert values["policy/ratio"] == pytest.approx((1.5 + 1.5 + 1.2 + 0.5 + 0.5 + 1 + 1) / 7)
    assert values["policy/ratio_max"] == pytest.approx(1.5)
    assert values["policy/clip_ratio/high"] == pytest.approx(2 / 7)
    assert values["policy/clip_ratio/low"] == pytest.approx(2 / 7)


def test_gspo_leaves_untrained_tokens_out_of_the_mean() -> None:
    """sqrt(2 * 8) = 4 over two trained tokens, whatever the third says."""
    tokens = tokens_of([2.0, 1e6, 8.0], [-1.0, -1.0, -1.0], [3])
    tokens = replace(tokens, weights=torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    loss, metrics = gspo_policy_loss(tokens, PLAIN)
    assert loss.item() == pytest.approx(2 * 4.0)
    assert finalise(metrics)["policy/ratio_max"] == pytest.approx(4.0)


def test_cispo_by_hand() -> None:
    """Weights min(max(ratio, 0.8), 1.3): constants, so that the gradient is -weight * A everywhere."""
    ratios, advantages = [1.0, 2.0, 2.0, 0.5, 0.5, 1.25], [3.0, 1.0, -1.0, 1.0, -1.0, 2.0]
    weights = [1.0, 1.3, 1.3, 0.8, 0.8, 1.25]
    tokens = tokens_of(ratios, advantages, [6])
    loss, metrics = cispo_policy_loss(tokens, PLAIN)
    expected = [-w * a * (math.log(r) - 1) for w, a, r in zip(weights, advantages, ratios, strict=True)]
    assert loss.item() == pytest.approx(sum(expected))
    assert gradient_of(loss, tokens) == pytest.approx(
        [-w * a for w, a in zip(weights, advantages, strict=True)]
    )
    assert finalise(metrics)["policy/ratio"] == pytest.approx(7.25 / 6)


def test_likelihood_by_hand() -> None:
    """No ratio anywhere: -A log pi, gradient -A."""
    tokens = tokens_of([1.0, 9.0, 0.1], [1.0, 1.0, 2.0], [3])
    loss, metrics = likelihood_loss(tokens, PLAIN)
    assert loss.item() == pytest.approx(1 - (math.log(9) - 1) - 2 * (math.log(0.1) - 1))
    assert gradient_of(loss, tokens) == pytest.approx([-1, -1, -2])
    assert finalise(metrics)["policy/ratio_max"] == pytest.approx(9.0)


def slow_loss(name: str, tokens: PolicyTokens, spec: PolicyLossSpec) -> Tensor:
    """Row by row and token by token."""
    weights = tokens.importance_weights
    assert weights is not None
    total = torch.zeros((), dtype=torch.float64)
    for start, end in zip(OFFSETS.tolist(), OFFSETS[1:].tolist(), strict=False):
        trained = [t for t in range(start, end) if tokens.weights[t] != 0]
        row = [tokens.logprobs[t] - tokens.old_logprobs[t] for t in trained]
        for t, log_ratio in zip(trained, row, strict=True):
            ratio = torch.exp(torch.stack(row).sum() / len(row) if name == "gspo" else log_ratio)
            low, high = 1 - spec.cliprange_low, 1 + spec.cliprange_high
            clipped = min(max(float(ratio.detach()), low), high)
            advantage = float(tokens.advantages[t])
            if name == "raft":
                surrogate = advantage * tokens.logprobs[t]
            elif name == "cispo":
                surrogate = clipped * advantage * tokens.logprobs[t]
            else:
                is_clipped = clipped * advantage < float(ratio.detach()) * advantage
                surrogate = (ratio.detach() * 0 + clipped if is_clipped else ratio) * advantage
            loss = -float(weights[t]) * surrogate - spec.entropy_coef * tokens.entropy[t]
            if spec.kl:
                d = tokens.logprobs[t] - tokens.ref_logprobs[t]
                kl = d * d / 2 if spec.kl.estimator == "k2" else torch.exp(-d) - 1 + d
                loss = loss + spec.kl.coef * kl
            total = total + float(tokens.weights[t]) * loss
    return total


@EVERY
@pytest.mark.parametrize(
    "spec", [FULL, replace(FULL, kl=KLInLoss(0.2, "k2")), PLAIN], ids=["k3", "k2", "plain"]
)
def test_loss_and_gradients_against_the_slow_reference(name: str, spec: PolicyLossSpec) -> None:
    base = random_tokens(seed=3)
    found = []
    for function in (
        lambda tokens: LOSSES[name](tokens, spec)[0],
        lambda tokens: slow_loss(name, tokens, spec),
    ):
        leaves = [base.logprobs.clone().requires_grad_(), base.entropy.clone().requires_grad_()]
        loss = function(replace(base, logprobs=leaves[0], entropy=leaves[1]))
        found.append((loss, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)))
    for ours, slow in zip(*found, strict=True):
        torch.testing.assert_close(ours, slow, rtol=1e-9, atol=1e-12)


@EVERY
def test_importance_weights_multiply_the_surrogate_and_nothing_else(name: str) -> None:
    """loss(w) = sum of w * surrogate + regularisers: twice the weights adds the surrogate once more."""
    base = random_tokens(seed=5)
    ones = torch.ones(14, dtype=torch.float64)

    def loss(weight: float, spec: PolicyLossSpec) -> float:
        return LOSSES[name](replace(base, importance_weights=weight * ones), spec)[0].item()

    surrogate = loss(1.0, PLAIN)
    regularisers = loss(0.0, FULL)
    assert loss(0.0, PLAIN) == 0.0
    assert loss(2.0, FULL) == pytest.approx(2 * surrogate + regularisers)
    assert LOSSES[name](replace(base, importance_weights=None), FULL)[0].item() == loss(1.0, FULL)
    d = base.logprobs - base.ref_logprobs
    by_hand = base.weights * (0.5 * (torch.exp(-d) - 1 + d) - 0.1 * base.entropy)
    assert regularisers == pytest.approx(by_hand[IS_TRAINED].sum().item())


@EVERY
@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
def test_junk_at_untrained_tokens_changes_nothing(name: str, junk: float) -> None:
    clean = random_tokens(seed=7)
    results = []
    for value in (0.0, junk):
        columns = {field: torch.where(IS_TRAINED, getattr(clean, field), value) for field in FIELDS}
        leaves = [columns[field].requires_grad_() for field in ("logprobs", "entropy")]
        loss, metrics = LOSSES[name](PolicyTokens(**columns, weights=clean.weights, offsets=OFFSETS), FULL)
        results.append((loss.item(), finalise(metrics), torch.autograd.grad(loss, leaves)))
    (loss, values, gradients), (junk_loss, junk_values, junk_gradients) = results
    assert math.isfinite(loss)
    assert (junk_loss, junk_values) == (loss, values)
    for gradient, other in zip(gradients, junk_gradients, strict=True):
        assert torch.equal(gradient, other)
        assert torch.equal(other[~IS_TRAINED], torch.zeros(6, dtype=torch.float64))


@EVERY
def test_on_policy_all_have_the_gradient_of_reinforce(name: str) -> None:
    """Where pi = pi_old every loss has the gradient -A grad log pi (GSPO: of its row's mean A)."""
    base = random_tokens(seed=1)
    logprobs = base.logprobs.clone().requires_grad_()
    advantages = torch.tensor([0.5, -1.0, 2.0, 0.3], dtype=torch.float64).repeat_interleave(
        torch.tensor(LENGTHS)
    )
    tokens = replace(
        base,
        logprobs=logprobs,
        old_logprobs=base.logprobs,
        advantages=advantages,
        importance_weights=None,
    )
    (gradient,) = torch.autograd.grad(LOSSES[name](tokens, PLAIN)[0], logprobs)
    torch.testing.assert_close(gradient, -base.weights * advantages)


@EVERY
def test_an_empty_micro_batch_is_a_zero_with_a_gradient(name: str) -> None:
    parameter, nothing = torch.ones(3, requires_grad=True), torch.empty(0)
    logprobs = torch.empty((0, 3)) @ parameter
    tokens = PolicyTokens(logprobs, logprobs, *[nothing] * 4, nothing, torch.zeros(1, dtype=torch.long))
    loss, metrics = LOSSES[name](tokens, FULL)
    loss.backward()
    assert loss.item() == 0.0
    assert parameter.grad is not None and parameter.grad.tolist() == [0.0, 0.0, 0.0]
    assert finalise(metrics) == {}


def test_which_algorithm_has_which_loss() -> None:
    others = {"gspo": gspo_policy_loss, "cispo": cispo_policy_loss, "raft": likelihood_loss}
    for name, row in ALGORITHMS.items():
        assert row.policy_loss is others.get(name, ppo_policy_loss), name
        assert row.needs_greedy == (name == "remax")
