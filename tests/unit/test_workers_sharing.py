"""Workers that share prompts give what they give without: log-probs, values, gradients, weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.config.schema import LoraSection, ModelSection, TrainingSection
from rlhf_ray.engines.deepspeed_engine import World
from rlhf_ray.types import RLBatch, Rollouts
from rlhf_ray.workers.frozen import ReferenceWorker
from rlhf_ray.workers.model_worker import ModelWorker, shuffled
from rlhf_ray.workers.policy import PolicyWorker
from rlhf_ray.workers.scalar import CriticWorker
from tests.local_roles import CPU, logged, online_section, weights_of
from tests.ranks import EXACT, run_ranks, worker_spec
from tests.samples import rollouts_of
from tests.tiny import tiny_model_folder
from tests.unit.test_deepspeed_engine import Arrays, first_moments
from tests.unit.test_loops_online import online_loop, train

NUM_PROMPTS, GROUP = 4, 6
WIDE, NARROW = 4096, 40
"""Token budgets: everything in one micro-batch; a group cut into several."""


def group_rollouts() -> Rollouts:
    """Prompts of 3 to 15 tokens with six answers of 1 to 12 each, not in the order of their prompts."""
    generator = np.random.default_rng(0)
    starts = [generator.integers(3, 290, 3 + 4 * prompt) for prompt in range(NUM_PROMPTS)]
    ids = generator.permutation(np.repeat(np.arange(NUM_PROMPTS), GROUP))
    answers = [np.append(generator.integers(3, 290, generator.integers(0, 12)), 2) for _ in ids]
    return rollouts_of([starts[i] for i in ids], answers, prompt_ids=ids)


ROLLOUTS = group_rollouts()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


def training(share_prompts: bool, **options: object) -> TrainingSection:
    return EXACT.model_copy(
        update={"share_prompts": share_prompts, "tokens_per_micro_batch": WIDE, **options}
    )


def section(**options: object):  # type: ignore[no-untyped-def]
    optimizer = {"learning_rate": 1e-3, "max_grad_norm": 1e6}
    return online_section(optimizer=optimizer, critic_optimizer=optimizer, temperature=0.7, **options)


def policy(
    model: ModelSection, share_prompts: bool, world: World | None = None, online=None, **options: object
) -> PolicyWorker:  # type: ignore[no-untyped-def]
    online = online or section()
    spec = worker_spec(training(share_prompts, **options), online.optimizer, world)
    return PolicyWorker(model, spec, online)


def critic(
    model: ModelSection, share_prompts: bool, world: World | None = None, **options: object
) -> CriticWorker:
    online = section()
    spec = worker_spec(training(share_prompts, **options), online.critic_optimizer, world)
    return CriticWorker(model, spec, online)


def rl_batch() -> RLBatch:
    generator = np.random.default_rng(1)
    tokens = ROLLOUTS.responses

    def column(mean: float) -> object:
        values = mean + 0.3 * generator.standard_normal(len(tokens.values))
        return tokens.with_values(values.astype(np.float32))

    return RLBatch(
        prompt_ids=ROLLOUTS.prompt_ids,
        prompts=ROLLOUTS.prompts,
        responses=tokens,
        old_logprobs=column(-5),
        ref_logprobs=column(-5),
        values=column(0),
        advantages=column(0),
        returns=column(1),
        importance_weights=tokens.with_values(np.ones(len(tokens.values), np.float32)),
        is_trained=tokens.with_values(generator.random(len(tokens.values)) < 0.9),
    )


BATCH = rl_batch()


def trained(worker: ModelWorker) -> tuple[dict[str, float], Arrays]:
    """Metrics of an update on the batch, and Adam's first moments after it."""
    if isinstance(worker, CriticWorker):
        metrics = worker.train_rl(BATCH, step=0)
    else:
        assert isinstance(worker, PolicyWorker)
        metrics = worker.train_rl(BATCH, step=0, kl_coef=0.1)
    return metrics, first_moments(worker)


def assert_same_training(
    shared: tuple[dict[str, float], Arrays], alone: tuple[dict[str, float], Arrays], tolerance: float = 1e-5
) -> None:
    assert shared[0] == pytest.approx(alone[0], rel=tolerance, abs=tolerance / 10)
    assert shared[1].keys() == alone[1].keys()
    for name, expected in alone[1].items():  # that of an adapter's A is 0 as long as B is
        off = np.linalg.norm(shared[1][name] - expected)
        assert off <= tolerance * np.linalg.norm(expected), f"{name} by {off}"


@pytest.mark.parametrize("budget", [WIDE, NARROW])
def test_logprobs_reference_and_values(model: ModelSection, budget: int) -> None:
    budget_option = {"tokens_per_micro_batch": budget}
    expected = policy(model, False).logprobs(ROLLOUTS).values
    shared = policy(model, True, **budget_option)
    np.testing.assert_allclose(shared.logprobs(ROLLOUTS).values, expected, rtol=1e-5, atol=1e-5)
    reference = ReferenceWorker(model, training(True, **budget_option), CPU, threads=1)
    assert np.array_equal(reference.logprobs(ROLLOUTS, 0.7).values, shared.logprobs(ROLLOUTS).values)
    values = critic(model, True, **budget_option).values(ROLLOUTS).values
    np.testing.assert_allclose(values, critic(model, False).values(ROLLOUTS).values, rtol=1e-5, atol=1e-6)
    probed = shared.probe(ROLLOUTS.sequences).values
    np.testing.assert_allclose(probed, policy(model, False).probe(ROLLOUTS.sequences).values, atol=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("budget", [WIDE, NARROW])
def test_an_update_of_the_policy(model: ModelSection, zero_stage: int, budget: int) -> None:
    options = {"zero_stage": zero_stage, "tokens_per_micro_batch": budget}
    assert_same_training(trained(policy(model, True, **options)), trained(policy(model, False)))


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_with_gradient_checkpointing(model: ModelSection, zero_stage: int) -> None:
    options = {"zero_stage": zero_stage, "gradient_checkpointing": True}
    assert_same_training(trained(policy(model, True, **options)), trained(policy(model, False)))


@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_adapters(model: ModelSection, zero_stage: int, checkpointing: bool) -> None:
    """Before the first update B is zero and A has no gradient; it has one at the second, where Adam has made
    more of the smallest differences."""
    lora = LoraSection(rank=4)
    shared = policy(model, True, zero_stage=zero_stage, lora=lora, gradient_checkpointing=checkpointing)
    alone = policy(model, False, zero_stage=zero_stage, lora=lora)
    reference = alone.reference_logprobs(ROLLOUTS, 0.7).values
    assert_same_training(trained(shared), trained(alone))
    assert_same_training(trained(shared), trained(alone), tolerance=1e-3)
    np.testing.assert_allclose(
        shared.reference_logprobs(ROLLOUTS, 0.7).values, reference, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_an_update_of_the_critic(model: ModelSection, zero_stage: int) -> None:
    options = {"zero_stage": zero_stage, "tokens_per_micro_batch": NARROW}
    assert_same_training(trained(critic(model, True, **options)), trained(critic(model, False)))


def test_groups_are_shuffled_whole() -> None:
    groups = np.array([0, 1, 0, 2, 1, 0, 3, 3])
    order = shuffled(groups, np.random.default_rng(1))
    assert sorted(order) == list(range(len(groups)))
    assert np.count_nonzero(np.diff(groups[order])) == 3, "four runs of equal groups"
    firsts = {tuple(groups[shuffled(groups, np.random.default_rng(seed))]) for seed in range(20)}
    assert len(firsts) > 5
    alone = shuffled(np.arange(9), np.random.default_rng(2))
    assert alone.tolist() == np.random.default_rng(2).permutation(9).tolist()


def test_mini_batches_that_cut_groups(model: ModelSection) -> None:
    """Two epochs of three optimizer steps on rows in the same order as without sharing."""
    online = section(num_mini_batches=3, num_ppo_epochs=2, prompts_per_step=4, num_generations=6)
    workers = [policy(model, share_prompts, online=online) for share_prompts in (True, False)]
    metrics = [worker.train_rl(BATCH, step=0, kl_coef=0.1) for worker in workers]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-5)
    shared, alone = (weights_of(worker) for worker in workers)
    for name, weight in alone.items():
        assert np.linalg.norm(shared[name] - weight) < 1e-5 * np.linalg.norm(weight), name


def test_the_first_ratio_is_1_exactly(model: ModelSection) -> None:
    """Old log-probs and the training forward are cut and laid out alike."""
    worker = policy(model, True, precision="mixed", tokens_per_micro_batch=NARROW)
    old = worker.logprobs(ROLLOUTS)
    batch = BATCH.__class__(**{**vars(BATCH), "old_logprobs": old, "ref_logprobs": old})
    metrics = worker.train_rl(batch, step=0, kl_coef=0.1)
    assert metrics["policy/ratio"] == metrics["policy/ratio_max"] == 1.0


def on_two_ranks(world: World, model: ModelSection) -> list[tuple[dict[str, float], Arrays, np.ndarray]]:
    found = []
    for zero_stage, budget in ((0, WIDE), (1, NARROW), (3, NARROW)):
        options = {"zero_stage": zero_stage, "tokens_per_micro_batch": budget}
        worker = policy(model, True, world, **options)
        logprobs = worker.logprobs(ROLLOUTS).values
        found.append((*trained(worker), logprobs))
    return found


def test_two_ranks(model: ModelSection, tmp_path: Path) -> None:
    first, second = run_ranks(on_two_ranks, 2, tmp_path, model)
    worker = policy(model, False)
    logprobs = worker.logprobs(ROLLOUTS).values
    alone = trained(worker)
    assert len(first) == 3
    for (metrics, moments, found), (other, _, _) in zip(first, second, strict=True):
        assert metrics == other, "ranks agree"
        assert_same_training((metrics, moments), alone)
        np.testing.assert_allclose(found, logprobs, rtol=1e-5, atol=1e-5)


def test_a_run_of_two_steps_is_the_same(model: ModelSection, tmp_path: Path) -> None:
    """PPO with all roles: rewards, KL, losses and gradients of both steps."""
    logs = []
    for share_prompts in (False, True):
        folder = tmp_path / str(share_prompts)
        online = section(num_steps=2, prompts_per_step=3, num_generations=4)
        train(online_loop(model, folder, online, training=training(share_prompts)))
        logs.append(logged(folder))
    for alone, shared in zip(*logs, strict=True):
        assert shared.keys() == alone.keys()
        numbers = [name for name, value in alone.items() if isinstance(value, float)]
        assert len(numbers) > 20
        for name in numbers:
            assert shared[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-4), name
