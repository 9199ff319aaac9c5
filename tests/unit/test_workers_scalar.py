"""Critic and reward trainer against scores of one row at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from rlhf_ray.config.schema import (
    DatasetSection,
    ModelSection,
    OptimizerSection,
    RewardSection,
    TrainingSection,
)
from rlhf_ray.loops.supervised import evaluate_pairs
from rlhf_ray.models.loading import load_scalar_model
from rlhf_ray.types import PairBatch, Ragged, RLBatch
from rlhf_ray.workers.scalar import CriticWorker, RewardTrainerWorker
from tests.local_roles import LocalRewardTrainer, online_section
from tests.ranks import EXACT, worker_spec
from tests.samples import random_rollouts
from tests.tiny import tiny_model_folder

LENGTHS = [(4, 9), (12, 3), (2, 20), (7, 1)]
ROLLOUTS = random_rollouts(LENGTHS)
BUDGETS = pytest.mark.parametrize("budget", [1, 60, 4096])
FAST = OptimizerSection(learning_rate=3e-3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


def exact(budget: int, packing: bool = False) -> TrainingSection:
    return EXACT.model_copy(update={"tokens_per_micro_batch": budget, "packing": packing})


@torch.no_grad()
def slow_values(model: ModelSection) -> np.ndarray:
    """The head's weight times each hidden state before a response token."""
    network = load_scalar_model(model, seed=0)
    found = []
    for prompt, response in zip(ROLLOUTS.prompts, ROLLOUTS.responses, strict=True):
        ids = torch.tensor([*prompt.tolist(), *response.tolist()])
        hidden = network.model(ids[None]).last_hidden_state[0]
        found.append(hidden[len(prompt) - 1 : -1] @ network.score.weight[0])
    return torch.cat(found).numpy()


@BUDGETS
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_values_by_hand_and_without_temperature(model: ModelSection, budget: int, temperature: float) -> None:
    critic = CriticWorker(model, worker_spec(exact(budget)), online_section(temperature=temperature))
    expected = slow_values(model)
    found = critic.values(ROLLOUTS)
    assert found.lengths.tolist() == [response for _, response in LENGTHS]
    np.testing.assert_allclose(found.values, expected, rtol=1e-5, atol=1e-5)
    chunks = [ROLLOUTS.select(rows) for rows in ([0], [1, 2], [3])]
    np.testing.assert_allclose(critic.values(*chunks).values, expected, rtol=1e-5, atol=1e-5)


def rl_batch(values: Ragged, returns: np.ndarray) -> RLBatch:
    zeros = values.with_values(np.zeros_like(values.values))
    return RLBatch(
        prompt_ids=ROLLOUTS.prompt_ids,
        prompts=ROLLOUTS.prompts,
        responses=ROLLOUTS.responses,
        old_logprobs=zeros,
        ref_logprobs=zeros,
        values=values,
        advantages=zeros,
        returns=values.with_values(returns.astype(np.float32)),
        importance_weights=values.with_values(np.ones(len(values.values), np.float32)),
        is_trained=values.with_values(np.ones(len(returns), dtype=bool)),
    )


@BUDGETS
def test_value_loss_by_hand_and_learning(model: ModelSection, budget: int) -> None:
    section = online_section(cliprange_value=None)
    critic = CriticWorker(model, worker_spec(exact(budget), FAST), section)
    values = critic.values(ROLLOUTS)
    returns = np.random.default_rng(0).standard_normal(len(values.values))
    metrics = critic.train_rl(rl_batch(values, returns), step=0)
    errors = values.values.astype(np.float64) - returns
    assert metrics["critic/loss"] == pytest.approx(0.5 * np.square(errors).mean(), rel=1e-5)
    assert metrics["critic/value_mean"] == pytest.approx(values.values.mean(), rel=1e-4)
    assert metrics["critic/return_mean"] == pytest.approx(returns.mean(), rel=1e-4)
    explained = 1 - np.var(returns - values.values) / np.var(returns)
    assert metrics["critic/explained_variance"] == pytest.approx(explained, rel=1e-4)
    for step in range(1, 20):
        later = critic.train_rl(rl_batch(values, returns), step)
    assert later["critic/loss"] < 0.3 * metrics["critic/loss"]


def test_value_clipping_holds_at_the_old_values(model: ModelSection) -> None:
    """With old values far from the present ones, all tokens are clipped and nothing is learned."""
    section = online_section(cliprange_value=0.1)
    critic = CriticWorker(model, worker_spec(EXACT, FAST), section)
    values = critic.values(ROLLOUTS)
    batch = rl_batch(values, values.values)
    batch = replace(batch, values=values.with_values(values.values + np.float32(5.0)))
    metrics = critic.train_rl(batch, step=0)
    # V moves at most 0.1 from V_old = R + 5, so the clipped error is 4.9.
    assert metrics["critic/loss"] == pytest.approx(0.5 * 4.9**2, rel=1e-4)
    assert metrics["critic/clip_fraction"] == 1.0
    assert metrics["critic/grad_norm"] == 0.0


def pairs(count: int = 6, margin: float = 0.0, soft_label: float = 1.0) -> PairBatch:
    """Chosen answers contain token 50, rejected ones token 60; lengths differ; all end in EOS."""
    generator = np.random.default_rng(1)
    prompts = [generator.integers(100, 290, generator.integers(2, 9)) for _ in range(count)]
    answers = [
        [[*prompt, *generator.integers(100, 290, generator.integers(1, 6)), token, 2] for prompt in prompts]
        for token in (50, 60)
    ]
    return PairBatch(
        prompt_lengths=np.array([len(prompt) for prompt in prompts]),
        chosen=Ragged.from_rows(answers[0], np.int32),
        rejected=Ragged.from_rows(answers[1], np.int32),
        margin=np.full(count, margin, dtype=np.float32),
        soft_label=np.full(count, soft_label, dtype=np.float32),
    )


@torch.no_grad()
def slow_scores(model: ModelSection, rows: Ragged) -> torch.Tensor:
    network = load_scalar_model(model, seed=0)
    ends = [network.model(torch.tensor([row.tolist()])).last_hidden_state[0, -1] for row in rows]
    return torch.stack(ends) @ network.score.weight[0]


@BUDGETS
@pytest.mark.parametrize("packing", [False, True])
def test_pair_loss_by_hand(model: ModelSection, budget: int, packing: bool) -> None:
    section = RewardSection(center_rewards_coefficient=0.02)
    trainer = RewardTrainerWorker(model, worker_spec(exact(budget, packing)), section)
    batch = pairs(margin=0.5, soft_label=0.8)
    chosen, rejected = slow_scores(model, batch.chosen), slow_scores(model, batch.rejected)
    ours = trainer.score_pairs(batch)
    np.testing.assert_allclose(ours[0].values, chosen.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[1].values, rejected.numpy(), rtol=1e-5, atol=1e-5)
    assert ours[0].lengths.tolist() == [1] * len(batch)

    lead = chosen - rejected - 0.5
    expected = -(0.8 * F.logsigmoid(lead) + 0.2 * F.logsigmoid(-lead)).mean()
    expected += 0.02 * (chosen + rejected).square().mean()
    metrics = trainer.train_pairs(batch)
    assert metrics["reward/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["reward/accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert metrics["reward/margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-4, abs=1e-6)


def test_learned_preferences_survive_saving(
    model: ModelSection, tmp_path_factory: pytest.TempPathFactory
) -> None:
    trainer = RewardTrainerWorker(
        model, worker_spec(EXACT, FAST), RewardSection(dataset=DatasetSection(path="pairs.jsonl"))
    )
    batch = pairs(12)
    for _ in range(15):
        trainer.train_pairs(batch)
    found = evaluate_pairs(LocalRewardTrainer(trainer), batch)
    chosen, rejected = trainer.score_pairs(batch)
    margins = chosen.values.astype(np.float64) - rejected.values
    assert found["eval/accuracy"] == 1.0
    assert found["eval/margin"] == pytest.approx(margins.mean())
    assert found["eval/loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean())
    longer = np.sign(batch.chosen.lengths - batch.rejected.lengths)
    assert found["eval/length_baseline"] == pytest.approx(((1 + longer) / 2).mean())
    assert found["eval/num_pairs"] == 12

    folder = tmp_path_factory.mktemp("reward")
    trainer.save_model(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        again = [
            plain.score(plain.model(torch.tensor([row.tolist()])).last_hidden_state)[0, -1, 0].item()
            for row in batch.chosen
        ]
    np.testing.assert_allclose(chosen.values, again, rtol=1e-5, atol=1e-5)
