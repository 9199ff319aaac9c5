"""The policy worker against plain forwards and losses over full logits."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_ray.config.schema import ModelSection, OnlineSection, TrainingSection
from rlhf_ray.types import Ragged, RLBatch, Rollouts, SFTBatch
from rlhf_ray.workers.frozen import ReferenceWorker
from rlhf_ray.workers.policy import PolicyWorker
from tests.local_roles import CPU, online_section, weights_of
from tests.ranks import EXACT, worker_spec
from tests.samples import random_rollouts
from tests.tiny import tiny_model_folder
from tests.unit.test_deepspeed_engine import distance, first_moments

TEMPERATURE = 0.6
MIXED = TrainingSection(precision="mixed", zero_stage=1, tokens_per_micro_batch=64)
LENGTHS = [(4, 9), (12, 3), (2, 20), (7, 1), (5, 6), (9, 14)]
ROLLOUTS = random_rollouts(LENGTHS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


def policy_worker(
    model: ModelSection, section: OnlineSection, training: TrainingSection = EXACT, seed: int = 0
) -> PolicyWorker:
    return PolicyWorker(model, worker_spec(training, section.optimizer, seed=seed), section)


def plain_model(model: ModelSection) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)


def slow_distributions(
    network: PreTrainedModel, rollouts: Rollouts, temperature: float
) -> list[torch.Tensor]:
    """Per row: [response tokens, V] log-probs at the positions that predict the response."""
    found = []
    for prompt, response in zip(rollouts.prompts, rollouts.responses, strict=True):
        ids = torch.tensor([*prompt.tolist(), *response.tolist()])
        logits = network(ids[None]).logits[0, len(prompt) - 1 : -1]
        found.append((logits / temperature).log_softmax(-1))
    return found


def of_tokens(distributions: list[torch.Tensor], rollouts: Rollouts) -> torch.Tensor:
    """[R] log-probs of the sampled tokens."""
    return torch.cat(
        [
            rows.gather(-1, torch.tensor(response.tolist())[:, None])[:, 0]
            for rows, response in zip(distributions, rollouts.responses, strict=True)
        ]
    )


def rl_batch(rollouts: Rollouts, old: Ragged, ref: Ragged, advantages: np.ndarray) -> RLBatch:
    zeros = old.with_values(np.zeros_like(old.values))
    return RLBatch(
        prompt_ids=rollouts.prompt_ids,
        prompts=rollouts.prompts,
        responses=rollouts.responses,
        old_logprobs=old,
        ref_logprobs=ref,
        values=zeros,
        advantages=old.with_values(advantages.astype(np.float32)),
        returns=zeros,
        importance_weights=old.with_values(np.ones(len(old.values), np.float32)),
        is_trained=old.with_values(np.ones(len(old.values), dtype=bool)),
    )


def random_advantages(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(len(ROLLOUTS.responses.values)).astype(np.float32)


def test_a_batch_of_which_nothing_is_trained_on_changes_nothing(model: ModelSection) -> None:
    """As when a reward source failed on all of it."""
    worker = policy_worker(model, online_section())
    before = weights_of(worker)
    old = worker.logprobs(ROLLOUTS)
    batch = rl_batch(ROLLOUTS, old, old, random_advantages())
    masked = replace(batch, is_trained=old.with_values(np.zeros(len(old.values), dtype=bool)))
    metrics = worker.train_rl(masked, step=0, kl_coef=0.0)
    assert np.isfinite(list(metrics.values())).all()
    for name, weight in weights_of(worker).items():
        np.testing.assert_array_equal(weight, before[name], err_msg=name)


@pytest.mark.parametrize("packing", [False, True])
def test_logprobs_are_divided_by_the_temperature_once(model: ModelSection, packing: bool) -> None:
    """By the policy and by the reference; a chunk more or less changes nothing."""
    training = EXACT.model_copy(update={"packing": packing, "tokens_per_micro_batch": 64})
    worker = policy_worker(model, online_section(temperature=TEMPERATURE), training)
    with torch.no_grad():
        network = plain_model(model)
        slow = of_tokens(slow_distributions(network, ROLLOUTS, TEMPERATURE), ROLLOUTS).numpy()
        at_one = of_tokens(slow_distributions(network, ROLLOUTS, 1.0), ROLLOUTS).numpy()
    found = worker.logprobs(ROLLOUTS)
    assert found.lengths.tolist() == [response for _, response in LENGTHS]
    np.testing.assert_allclose(found.values, slow, rtol=1e-5, atol=2e-5)
    assert np.abs(found.values - at_one).mean() > 0.1
    reference = ReferenceWorker(model, training, CPU, threads=1).logprobs(ROLLOUTS, TEMPERATURE)
    np.testing.assert_allclose(reference.values, slow, rtol=1e-5, atol=2e-5)
    chunks = [ROLLOUTS.select(rows) for rows in ([0, 1], [2], [3, 4, 5])]
    np.testing.assert_allclose(worker.logprobs(*chunks).values, found.values, rtol=1e-5, atol=2e-5)


def test_probe_is_what_an_engine_scores(model: ModelSection) -> None:
    """Every token after the first, at temperature 1, whatever the stage's temperature."""
    worker = policy_worker(model, online_section(temperature=TEMPERATURE))
    rows = ROLLOUTS.sequences
    with torch.no_grad():
        network = plain_model(model)
        slow = [
            network(torch.tensor([row.tolist()]))
            .logits[0, :-1]
            .log_softmax(-1)[np.arange(len(row) - 1), row[1:]]
            for row in rows
        ]
    found = worker.probe(rows)
    assert found.lengths.tolist() == (rows.lengths - 1).tolist()
    np.testing.assert_allclose(found.values, torch.cat(slow).numpy(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("training", [EXACT, MIXED], ids=["float32", "mixed"])
@pytest.mark.parametrize("packing", [False, True])
def test_first_ratio_is_1_and_first_kl_0_exactly(
    model: ModelSection, training: TrainingSection, packing: bool
) -> None:
    training = training.model_copy(update={"packing": packing})
    section = online_section(temperature=TEMPERATURE)
    worker = policy_worker(model, section, training)
    old = worker.logprobs(ROLLOUTS)
    ref = ReferenceWorker(model, training, CPU, threads=1).logprobs(ROLLOUTS, TEMPERATURE)
    assert np.array_equal(old.values, ref.values)
    metrics = worker.train_rl(rl_batch(ROLLOUTS, old, ref, random_advantages()), step=0, kl_coef=0.1)
    assert metrics["policy/ratio"] == metrics["policy/ratio_max"] == 1.0
    assert [metrics[f"policy/approx_kl_{k}"] for k in ("k1", "k2", "k3")] == [0.0, 0.0, 0.0]
    assert metrics["policy/clip_ratio/low"] == metrics["policy/clip_ratio/high"] == 0.0
    later = worker.train_rl(rl_batch(ROLLOUTS, old, ref, random_advantages()), step=1, kl_coef=0.1)
    assert later["policy/ratio_max"] > 1.0, "the first update moved the policy"


def slow_ppo_loss(
    network: PreTrainedModel, batch: RLBatch, section: OnlineSection, kl_coef: float
) -> torch.Tensor:
    """Schulman et al. 2017, equations 7 and 9, token by token over full distributions."""
    rows = slow_distributions(network, ROLLOUTS, section.temperature)
    logprobs = of_tokens(rows, ROLLOUTS)
    entropy = torch.cat([-(row.exp() * row).sum(-1) for row in rows])
    old, ref, advantages = (
        torch.tensor(column.values) for column in (batch.old_logprobs, batch.ref_logprobs, batch.advantages)
    )
    ratio = (logprobs - old).exp()
    recipe = section.recipe
    clipped = ratio.clamp(1 - recipe.cliprange, 1 + recipe.cliprange_high)
    losses = -torch.minimum(ratio * advantages, clipped * advantages) - section.entropy_coef * entropy
    if recipe.kl_placement == "loss":
        d = logprobs - ref
        losses = losses + kl_coef * (d**2 / 2 if recipe.kl_estimator == "k2" else torch.exp(-d) - 1 + d)
    if recipe.loss_aggregation == "token":
        return losses.mean()
    return torch.stack([row.mean() for row in losses.split(batch.responses.lengths.tolist())]).mean()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_aggregation": "sequence"},
        {"entropy_coef": 0.3},
        {"kl_placement": "loss", "kl_estimator": "k2"},
        {"kl_placement": "loss", "kl_estimator": "k3", "loss_aggregation": "sequence"},
    ],
    ids=str,
)
def test_ppo_update_against_full_logits(model: ModelSection, options: dict[str, object]) -> None:
    """One step of Adam on the slow loss gives the same loss, gradient and weights."""
    section = online_section(
        temperature=TEMPERATURE, optimizer={"learning_rate": 1e-3, "max_grad_norm": 1e6}, **options
    )
    training = EXACT.model_copy(update={"tokens_per_micro_batch": 60})
    worker, network = policy_worker(model, section, training), plain_model(model)
    with torch.no_grad():
        now = of_tokens(slow_distributions(network, ROLLOUTS, TEMPERATURE), ROLLOUTS)
    noise = 0.3 * torch.randn(2, len(now), generator=torch.Generator().manual_seed(0))
    old, ref = (ROLLOUTS.responses.with_values((now + each).numpy()) for each in noise)
    batch = rl_batch(ROLLOUTS, old, ref, random_advantages())

    loss = slow_ppo_loss(network, batch, section, kl_coef=0.5)
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in network.parameters()])
    adam = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    adam.step()

    metrics = worker.train_rl(batch, step=0, kl_coef=0.5)
    assert metrics["policy/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["policy/grad_norm"] == pytest.approx(float(gradients.norm()), rel=1e-5)
    assert 0 < metrics["policy/clip_ratio/low"] < 0.5
    assert 0 < metrics["policy/clip_ratio/high"] < 0.5
    found = first_moments(worker)
    moments = {name: adam.state[p]["exp_avg"].flatten().numpy() for name, p in network.named_parameters()}
    assert distance(found, moments) < 1e-5
    for name, weight in weights_of(worker).items():
        expected = network.get_parameter(name).detach().numpy()
        # Where a gradient is as small as Adam's epsilon, its last bits decide how far the weight goes.
        assert np.linalg.norm(weight - expected) < 2e-5 * np.linalg.norm(expected), name


def test_tokens_with_positive_advantage_become_likelier(model: ModelSection) -> None:
    section = online_section(optimizer={"learning_rate": 1e-3}, cliprange=10.0)
    worker = policy_worker(model, section)
    old = worker.logprobs(ROLLOUTS)
    signs = np.where(np.arange(len(ROLLOUTS))[ROLLOUTS.responses.row_ids] % 2, 1.0, -1.0)
    batch = rl_batch(ROLLOUTS, old, old, signs)
    for step in range(3):
        worker.train_rl(batch, step, kl_coef=0.0)
    change = worker.logprobs(ROLLOUTS).values - old.values
    assert change[signs > 0].mean() > 0.05
    assert change[signs < 0].mean() < -0.05


def test_untrained_tokens_may_hold_anything(model: ModelSection) -> None:
    section = online_section(optimizer={"learning_rate": 1e-3})
    ended = []
    for junk in (0.0, np.nan):
        worker = policy_worker(model, section)
        old = worker.logprobs(ROLLOUTS)
        is_trained = np.arange(len(old.values)) % 3 != 0
        advantages = np.where(is_trained, random_advantages(), junk)
        batch = replace(rl_batch(ROLLOUTS, old, old, advantages), is_trained=old.with_values(is_trained))
        metrics = worker.train_rl(batch, step=0, kl_coef=0.1)
        assert np.isfinite(list(metrics.values())).all()
        ended.append(weights_of(worker))
    assert all(np.array_equal(ended[0][name], ended[1][name]) for name in ended[0])


def test_mini_batches_are_optimizer_steps_in_an_order_of_the_step(model: ModelSection) -> None:
    """2 epochs of 3 mini-batches are 6 steps; the order depends on the seed and the step."""
    section = online_section(
        num_mini_batches=3, num_ppo_epochs=2, prompts_per_step=6, num_generations=1, cliprange=10.0
    )
    ended = []
    for seed, step in ((0, 5), (0, 5), (0, 6), (1, 5)):
        worker = policy_worker(model, section, seed=seed)
        old = worker.logprobs(ROLLOUTS)
        worker.train_rl(rl_batch(ROLLOUTS, old, old, random_advantages()), step, kl_coef=0.0)
        assert worker.engine.scheduler.last_epoch == 6
        ended.append(np.concatenate([weight.ravel() for weight in weights_of(worker).values()]))
    assert np.array_equal(ended[0], ended[1])
    assert not np.array_equal(ended[0], ended[2])
    assert not np.array_equal(ended[0], ended[3])


def test_sft_loss_is_that_of_transformers(model: ModelSection) -> None:
    """The library's own loss over the same tokens, where labels of -100 are no targets."""
    tokens = ROLLOUTS.sequences
    is_target = tokens.with_values(np.arange(len(tokens.values)) % 4 != 1)
    width = int(tokens.lengths.max())
    ids, labels = torch.full((len(tokens), width), 2), torch.full((len(tokens), width), -100)
    for row, (token_row, target_row) in enumerate(zip(tokens, is_target, strict=True)):
        ids[row, : len(token_row)] = torch.tensor(token_row.tolist())
        kept = np.where(target_row, token_row, -100)
        labels[row, : len(token_row)] = torch.tensor(kept.tolist())
    with torch.no_grad():
        expected = plain_model(model)(ids, labels=labels).loss.item()

    worker = PolicyWorker(model, worker_spec(EXACT.model_copy(update={"tokens_per_micro_batch": 40})))
    batch = SFTBatch(tokens, is_target)
    before = worker.evaluate_sft(batch)
    assert before["sft/loss"] == pytest.approx(expected, rel=1e-5)
    assert before["sft/perplexity"] == pytest.approx(np.exp(expected), rel=1e-4)
    assert worker.train_sft(batch)["sft/loss"] == pytest.approx(expected, rel=1e-5)
    assert worker.evaluate_sft(batch)["sft/loss"] < expected - 0.01
    assert worker.evaluate_sft(batch) == worker.evaluate_sft(batch), "evaluation trains nothing"


def test_a_published_model_folder_gives_the_workers_logprobs(
    model: ModelSection, tmp_path_factory: pytest.TempPathFactory
) -> None:
    worker = policy_worker(model, online_section(temperature=TEMPERATURE))
    old = worker.logprobs(ROLLOUTS)
    worker.train_rl(rl_batch(ROLLOUTS, old, old, random_advantages()), step=0, kl_coef=0.0)
    folder = tmp_path_factory.mktemp("saved")
    worker.save_model(folder)
    saved = ModelSection(path=str(folder))
    with torch.no_grad():
        network = copy.deepcopy(plain_model(saved))
        slow = of_tokens(slow_distributions(network, ROLLOUTS, TEMPERATURE), ROLLOUTS).numpy()
    np.testing.assert_allclose(worker.logprobs(ROLLOUTS).values, slow, rtol=1e-5, atol=2e-5)
    reference = ReferenceWorker(saved, EXACT, CPU, threads=1)
    np.testing.assert_allclose(reference.logprobs(ROLLOUTS, TEMPERATURE).values, slow, rtol=1e-5, atol=2e-5)
