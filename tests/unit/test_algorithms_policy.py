"""The policy loss and its aggregation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms import ALGORITHMS
from rlhf_ray.algorithms.aggregation import Aggregation, loss_denominator, loss_weights
from rlhf_ray.algorithms.metrics import finalise
from rlhf_ray.algorithms.policy_losses import KLInLoss, PolicyLossSpec, PolicyTokens, ppo_policy_loss

PLAIN = PolicyLossSpec(cliprange_low=0.2, cliprange_high=0.3)
FULL = PolicyLossSpec(0.2, 0.3, entropy_coef=0.1, kl=KLInLoss(0.5, "k3"))
FIELDS = ("logprobs", "entropy", "old_logprobs", "ref_logprobs", "advantages")


def random_tokens(num_tokens: int, seed: int = 0) -> PolicyTokens:
    generator = torch.Generator().manual_seed(seed)
    old, ref, entropy = -torch.rand((3, num_tokens), generator=generator, dtype=torch.float64) * 3
    change, advantages = torch.randn((2, num_tokens), generator=generator, dtype=torch.float64)
    weights = torch.ones(num_tokens, dtype=torch.float64)
    return PolicyTokens(old + 0.3 * change, -entropy, old, ref, advantages, weights)


def slow_loss(tokens: PolicyTokens, spec: PolicyLossSpec) -> float:
    """Token by token, in plain Python."""
    total = 0.0
    for i, weight in enumerate(tokens.weights.tolist()):
        logprob, entropy, old, ref, advantage = (getattr(tokens, name)[i].item() for name in FIELDS)
        ratio = math.exp(logprob - old)
        clipped = min(max(ratio, 1 - spec.cliprange_low), 1 + spec.cliprange_high)
        loss = -min(ratio * advantage, clipped * advantage) - spec.entropy_coef * entropy
        if spec.kl:
            d = logprob - ref
            loss += spec.kl.coef * (d * d / 2 if spec.kl.estimator == "k2" else math.exp(-d) - 1 + d)
        total += weight * loss
    return total


def test_clipped_surrogate_by_hand() -> None:
    ratios = torch.tensor([1.0, 2.0, 2.0, 0.5, 0.5, 1.25])
    tokens = PolicyTokens(
        logprobs=ratios.log().requires_grad_(),
        entropy=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        old_logprobs=torch.zeros(6),
        ref_logprobs=torch.zeros(6),
        advantages=torch.tensor([3.0, 1.0, -1.0, 1.0, -1.0, 2.0]),
        weights=torch.ones(6),
    )
    loss, metrics = ppo_policy_loss(tokens, PLAIN)
    # Surrogates: 3; min(2, 1.3); min(-2, -1.3); min(0.5, 0.8); min(-0.5, -0.8); 2.5.
    assert loss.item() == pytest.approx(-(3 + 1.3 - 2 + 0.5 - 0.8 + 2.5), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, tokens.logprobs)
    assert gradient.tolist() == pytest.approx([-3.0, 0.0, 2.0, -0.5, 0.0, -2.5], rel=1e-6)
    r = [math.log(x) for x in ratios.tolist()]
    assert finalise(metrics) == pytest.approx(
        {
            "policy/loss": -4.5 / 6,
            "policy/ratio": 7.25 / 6,
            "policy/ratio_max": 2.0,
            "policy/clip_ratio/low": 1 / 6,
            "policy/clip_ratio/high": 1 / 6,
            "policy/approx_kl_k1": sum(-x for x in r) / 6,
            "policy/approx_kl_k2": sum(x * x / 2 for x in r) / 6,
            "policy/approx_kl_k3": sum(math.exp(x) - 1 - x for x in r) / 6,
            "policy/entropy": 3.5,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_agrees_with_plain_python(estimator: str) -> None:
    spec = replace(FULL, kl=KLInLoss(0.5, estimator))  # type: ignore[arg-type]
    tokens = replace(random_tokens(40), weights=torch.arange(40, dtype=torch.float64) % 4)
    loss, metrics = ppo_policy_loss(tokens, spec)
    assert loss.item() == pytest.approx(slow_loss(tokens, spec), rel=1e-12)
    assert finalise(metrics)["policy/loss"] == pytest.approx(loss.item() / tokens.weights.sum().item())


def test_first_ratio_is_exactly_one_and_the_gradient_is_reinforce() -> None:
    tokens = random_tokens(100)
    logprobs = tokens.old_logprobs.float().requires_grad_()
    first = replace(
        tokens,
        logprobs=logprobs,
        old_logprobs=logprobs.detach().clone(),
        advantages=tokens.advantages.float(),
    )
    loss, metrics = ppo_policy_loss(first, PLAIN)
    values = finalise(metrics)
    assert values["policy/ratio"] == values["policy/ratio_max"] == 1.0
    for name in ("clip_ratio/low", "clip_ratio/high", "approx_kl_k1", "approx_kl_k2", "approx_kl_k3"):
        assert values[f"policy/{name}"] == 0.0
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -first.advantages)


def test_gradients_are_right() -> None:
    tokens = random_tokens(12)

    def loss_of(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return ppo_policy_loss(replace(tokens, logprobs=logprobs, entropy=entropy), FULL)[0]

    inputs = (tokens.logprobs.clone().requires_grad_(), tokens.entropy.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss_of, inputs)


def test_entropy_is_rewarded_and_kl_is_punished() -> None:
    tokens = random_tokens(5)
    base = ppo_policy_loss(tokens, PLAIN)[0].item()
    rewarded = ppo_policy_loss(tokens, replace(PLAIN, entropy_coef=0.1))[0].item()
    assert rewarded == pytest.approx(base - 0.1 * tokens.entropy.sum().item())
    punished, metrics = ppo_policy_loss(tokens, replace(PLAIN, kl=KLInLoss(0.5, "k2")))
    k2 = (tokens.logprobs - tokens.ref_logprobs).square().sum().item() / 2
    assert punished.item() == pytest.approx(base + 0.5 * k2)
    assert finalise(metrics)["kl/in_loss"] == pytest.approx(0.5 * k2 / 5)


def test_k1_in_the_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="in the loss use k2 or k3"):
        KLInLoss(0.1, "k1")  # type: ignore[arg-type]


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_junk_at_untrained_tokens_changes_nothing(junk: float) -> None:
    clean = random_tokens(6)
    is_trained = torch.tensor([True, False, True, True, False, True])
    weights = is_trained.double()
    columns = {
        name: torch.where(is_trained, getattr(clean, name), junk).requires_grad_(
            name in ("logprobs", "entropy")
        )
        for name in FIELDS
    }
    leaves = [columns["logprobs"], columns["entropy"]]
    loss, metrics = ppo_policy_loss(PolicyTokens(**columns, weights=weights), FULL)
    gradients = torch.autograd.grad(loss, leaves)
    few = PolicyTokens(
        **{
            name: getattr(clean, name)[is_trained].requires_grad_(name in ("logprobs", "entropy"))
            for name in FIELDS
        },
        weights=torch.ones(4, dtype=torch.float64),
    )
    loss_of_few, metrics_of_few = ppo_policy_loss(few, FULL)
    gradients_of_few = torch.autograd.grad(loss_of_few, [few.logprobs, few.entropy])
    torch.testing.assert_close(loss, loss_of_few)
    assert finalise(metrics) == pytest.approx(finalise(metrics_of_few), rel=1e-12)
    for gradient, expected in zip(gradients, gradients_of_few, strict=True):
        torch.testing.assert_close(gradient[is_trained], expected)
        assert torch.equal(gradient[~is_trained], torch.zeros(2, dtype=torch.float64))


def test_an_empty_micro_batch_is_a_zero_with_a_gradient() -> None:
    """A rank without rows runs forward and backward like the others."""
    parameter = torch.ones(3, requires_grad=True)
    nothing = torch.empty(0)
    logprobs = torch.empty((0, 3)) @ parameter
    loss, metrics = ppo_policy_loss(PolicyTokens(logprobs, logprobs, *[nothing] * 4), FULL)
    loss.backward()
    assert loss.item() == 0.0
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0.0, 0.0, 0.0]
    assert finalise(metrics) == {}
    assert set(metrics) == set(ppo_policy_loss(random_tokens(3), FULL)[1])


# aggregation


@pytest.mark.parametrize(
    ("aggregation", "weights", "denominator"),
    [
        ("token", [1.0, 0.0, 1.0, 0.0, 0.0, 1.0], 3),
        ("sequence", [0.5, 0.0, 0.5, 0.0, 0.0, 1.0], 2),
        ("constant", [1.0, 0.0, 1.0, 0.0, 0.0, 1.0], 2 * 10),
    ],
)
def test_weights_by_hand(aggregation: Aggregation, weights: list[float], denominator: int) -> None:
    """Rows of 3, 2, 0 and 1 tokens; the second has nothing to train, the third has nothing at all."""
    offsets = torch.tensor([0, 3, 5, 5, 6])
    is_trained = torch.tensor([True, False, True, False, False, True])
    assert loss_weights(offsets, is_trained, aggregation).tolist() == weights
    assert loss_denominator(offsets, is_trained, aggregation, max_length=10) == denominator


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_weights_and_denominator_give_the_mean_they_promise(aggregation: Aggregation) -> None:
    lengths = [5, 1, 9, 3]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    generator = torch.Generator().manual_seed(0)
    x, is_trained = torch.rand(18, generator=generator), torch.rand(18, generator=generator) < 0.6
    rows = [r[m] for r, m in zip(x.split(lengths), is_trained.split(lengths), strict=True) if m.any()]
    expected = (
        torch.cat(rows).mean() if aggregation == "token" else torch.stack([r.mean() for r in rows]).mean()
    )
    total = (x * loss_weights(offsets, is_trained, aggregation)).sum()
    result = total / loss_denominator(offsets, is_trained, aggregation, max_length=9)
    assert result.item() == pytest.approx(expected.item(), rel=1e-6)


def test_table_row_ppo_uses_this_loss() -> None:
    tokens = random_tokens(7)
    assert torch.equal(ALGORITHMS["ppo"].policy_loss(tokens, FULL)[0], ppo_policy_loss(tokens, FULL)[0])
