"""Against a plain Hugging Face forward of one row at a time, with all logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_ray.config.schema import Layout, ModelSection
from rlhf_ray.models import target_stats
from rlhf_ray.models.batching import before_responses, collate, last_positions
from rlhf_ray.models.heads import PolicyModel, ScalarModel, num_head_chunks, token_stats
from rlhf_ray.models.loading import load_policy_model, load_scalar_model
from rlhf_ray.types import Ragged
from tests.tiny import tiny_model_folder

CPU = torch.device("cpu")
TEMPERATURE = 0.7
LAYOUTS: tuple[Layout, ...] = ("padded", "packed")
LENGTHS = [9, 30, 4, 17, 2]
PROMPTS = np.array([3, 10, 1, 16, 1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


def sequences() -> Ragged:
    """Rows that end in EOS, which is also the pad token."""
    generator = np.random.default_rng(0)
    rows = [np.append(generator.integers(3, 290, length - 1), 2) for length in LENGTHS]
    return Ragged.from_rows(rows, np.int32)


@pytest.mark.parametrize("entropy_has_grad", [False, True])
def test_a_frozen_head_passes_the_same_gradient_on(entropy_has_grad: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(6, 40)
    hidden, weights = torch.randn(10, 6, generator=generator), torch.randn(2, 10, generator=generator)
    targets = torch.randint(40, (10,), generator=generator)

    def gradient() -> torch.Tensor:
        leaf = hidden.clone().requires_grad_()
        stats = token_stats(head, leaf, targets, TEMPERATURE, 3, entropy_has_grad)
        assert stats.entropy.requires_grad is entropy_has_grad
        (weights[0] * stats.logprobs + weights[1] * stats.entropy).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    expected = gradient()
    head.requires_grad_(False)
    assert torch.equal(gradient(), expected)


@pytest.mark.parametrize("block_logits", [1, 120, target_stats.BLOCK_LOGITS])
@pytest.mark.parametrize("num_chunks", [1, 3, 10, 50])
@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_token_stats_against_full_logits(
    num_chunks: int, temperature: float, block_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one row, of three, and of all."""
    monkeypatch.setattr(target_stats, "BLOCK_LOGITS", block_logits)
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(6, 40)
    hidden = torch.randn(10, 6, generator=generator, requires_grad=True)
    targets = torch.randint(40, (10,), generator=generator)
    targets[3] = head(hidden).argmax(-1)[3]

    logprobs = (head(hidden) / temperature).log_softmax(-1)
    slow = logprobs[torch.arange(10), targets], -(logprobs.exp() * logprobs).sum(-1)
    fast = token_stats(head, hidden, targets, temperature, num_chunks, entropy_has_grad=True)
    torch.testing.assert_close(fast.logprobs, slow[0])
    torch.testing.assert_close(fast.entropy, slow[1])
    assert fast.is_top.tolist() == (logprobs.argmax(-1) == targets).tolist()

    weights = torch.randn(2, 10, generator=generator)
    inputs = [hidden, *head.parameters()]
    expected = torch.autograd.grad((weights[0] * slow[0] + weights[1] * slow[1]).sum(), inputs)
    found = torch.autograd.grad((weights[0] * fast.logprobs + weights[1] * fast.entropy).sum(), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_entropy_without_gradient_has_the_same_value() -> None:
    head, hidden, targets = nn.Linear(6, 40), torch.randn(10, 6), torch.randint(40, (10,))
    with_gradient = token_stats(head, hidden, targets, 1.0, 3, entropy_has_grad=True)
    without = token_stats(head, hidden, targets, 1.0, 3)
    assert torch.equal(without.entropy, with_gradient.entropy)
    assert (without.entropy.requires_grad, without.logprobs.requires_grad) == (False, True)


def test_token_stats_of_nothing_reach_the_head() -> None:
    """A rank without rows still runs its part of the graph; its gradients are 0."""
    head = nn.Linear(6, 40)
    stats = token_stats(head, torch.randn(0, 6), torch.zeros(0, dtype=torch.long), 1.0, 3)
    assert [len(column) for column in (stats.logprobs, stats.entropy, stats.is_top)] == [0, 0, 0]
    stats.logprobs.sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().sum() == 0


def test_chunks_hold_the_budget() -> None:
    assert [num_head_chunks(tokens) for tokens in (0, 1, 512, 513, 4096)] == [1, 1, 1, 2, 8]


def slow_logprobs(model: PreTrainedModel, rows: Ragged, temperature: float) -> list[torch.Tensor]:
    """Of the response tokens of each row, by a forward of that row alone."""
    found = []
    for row, start in zip(rows, PROMPTS, strict=True):
        ids = torch.tensor(row.tolist())
        logprobs = (model(ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
        found.append(logprobs[torch.arange(len(ids) - 1), ids[1:]][start - 1 :])
    return found


def gradients(module: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_logprobs_and_gradients_against_one_row_at_a_time(model: ModelSection, layout: Layout) -> None:
    """Padding or the neighbours in a packed row change neither."""
    policy = PolicyModel(load_policy_model(model), token_budget=2000)
    plain = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    rows = sequences()
    weights = torch.randn(sum(LENGTHS) - PROMPTS.sum(), generator=torch.Generator().manual_seed(1))

    slow = torch.cat(slow_logprobs(plain, rows, TEMPERATURE))
    expected = gradients(plain, (slow * weights).sum())
    batch = collate(rows, before_responses(PROMPTS, rows), layout, CPU)
    fast = policy(batch, temperature=TEMPERATURE).logprobs
    found = gradients(policy.model, (fast * weights).sum())

    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=2e-5)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        distance = (gradient - expected[name]).norm() / expected[name].norm()
        assert distance < 1e-5, name


def test_packed_neighbours_are_not_seen(model: ModelSection) -> None:
    policy = PolicyModel(load_policy_model(model), token_budget=512)
    rows = sequences()
    others = Ragged.from_rows([np.full(9, 250), *list(rows)[1:]], np.int32)
    with torch.no_grad():
        before, after = (
            policy(collate(each, before_responses(PROMPTS, each), "packed", CPU)).logprobs
            for each in (rows, others)
        )
    own = LENGTHS[0] - PROMPTS[0]
    assert (before[:own] - after[:own]).abs().max() > 0.1
    torch.testing.assert_close(before[own:], after[own:], rtol=0, atol=1e-6)


def slow_scores(model: PreTrainedModel, rows: Ragged) -> torch.Tensor:
    """The score head's weight times the last hidden state of each row alone."""
    hidden = [model.model(torch.tensor(row.tolist())[None]).last_hidden_state[0, -1] for row in rows]
    return torch.stack(hidden) @ model.score.weight[0]


@torch.no_grad()
def test_score_is_that_of_the_last_token(model: ModelSection) -> None:
    """Alone or in a batch, in any order, padded or packed; also where it is EOS, which is the pad token."""
    network = load_scalar_model(model, seed=0)
    scalar = ScalarModel(network)
    rows = sequences()
    expected = slow_scores(network, rows)
    assert expected.std() > 0.1
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [1], [2, 1]):
        chosen = rows.select(order)
        for layout in LAYOUTS:
            scores = scalar(collate(chosen, last_positions(chosen), layout, CPU))
            torch.testing.assert_close(scores, expected[order], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_score_does_not_depend_on_the_side_of_the_padding(model: ModelSection) -> None:
    network = load_scalar_model(model, seed=0)
    rows = sequences()
    width = max(LENGTHS)
    ids, mask = torch.zeros(5, width, dtype=torch.long), torch.zeros(5, width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :], mask[index, width - len(row) :] = torch.tensor(row.tolist()), 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    left = network.model(ids, attention_mask=mask, position_ids=positions).last_hidden_state[:, -1]
    right = ScalarModel(network)(collate(rows, last_positions(rows), "padded", CPU))
    torch.testing.assert_close(right, left @ network.score.weight[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_value_for_every_response_token(model: ModelSection) -> None:
    """V of the state before token t reads the hidden state of token t - 1."""
    network = load_scalar_model(model, seed=0)
    rows = sequences()
    values = ScalarModel(network)(collate(rows, before_responses(PROMPTS, rows), "padded", CPU))
    slow = [
        (network.model(torch.tensor(row.tolist())[None]).last_hidden_state[0] @ network.score.weight[0])
        for row in rows
    ]
    expected = torch.cat([row[start - 1 : -1] for row, start in zip(slow, PROMPTS, strict=True)])
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


def test_a_model_of_another_folder_scores_otherwise(model: ModelSection, tmp_path: Path) -> None:
    """Guards the tests above: the score depends on the weights."""
    other = ModelSection(path=str(tiny_model_folder(tmp_path, seed=1)))
    rows = sequences()
    with torch.no_grad():
        one, two = (slow_scores(load_scalar_model(each, seed=0), rows) for each in (model, other))
    assert (one - two).abs().min() > 1e-3
