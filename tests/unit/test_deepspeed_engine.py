"""Every ZeRO stage, on one rank and on two, against plain PyTorch; schedules; checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from rlhf_ray.config.schema import ModelSection, OptimizerSection, TrainingSection
from rlhf_ray.engines.deepspeed_engine import World
from rlhf_ray.errors import CheckpointError
from rlhf_ray.types import Metrics, Ragged, SFTBatch
from rlhf_ray.workers.policy import PolicyWorker
from tests.local_roles import weights_of
from tests.ranks import run_ranks, single_world, worker_spec
from tests.tiny import tiny_model_folder

STAGES = [0, 1, 2, 3]
BETA_1 = 0.9
LENGTHS = [30, 3, 17, 9, 24, 12, 5, 2]
BUDGETS = {"1x8": 8 * 30, "2x4": 4 * 30, "8x1": 1}
"""Tokens a micro-batch, for about so many micro-batches of so many rows."""
NO_CLIPPING = OptimizerSection(learning_rate=1e-3, max_grad_norm=1e6)
CLIPPING = OptimizerSection(learning_rate=1e-3, max_grad_norm=0.05)

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


def batch(seed: int = 0, lengths: Sequence[int] = LENGTHS) -> SFTBatch:
    """Rows of uneven lengths; about two thirds of their tokens are targets, and so is every last one."""
    generator = np.random.default_rng(seed)
    tokens = Ragged.from_rows([generator.integers(3, 290, length) for length in lengths], np.int32)
    is_target = generator.random(len(tokens.values)) < 0.66
    is_target[tokens.offsets[1:] - 1] = True
    is_target[tokens.offsets[:-1]] = False
    return SFTBatch(tokens, tokens.with_values(is_target))


def worker(
    model: ModelSection,
    zero_stage: int,
    budget: int = 4096,
    optimizer: OptimizerSection = NO_CLIPPING,
    world: World | None = None,
    **training: object,
) -> PolicyWorker:
    section = TrainingSection(
        **{"precision": "float32", "zero_stage": zero_stage, "tokens_per_micro_batch": budget, **training}
    )
    return PolicyWorker(model, worker_spec(section, optimizer, world))


def first_moments(trained: PolicyWorker) -> Arrays:
    """Adam's exp_avg of every trained parameter, whole, on every rank: (1 - beta_1) * gradient after one
    step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    found = {}
    for name, parameter in trained.engine.module.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if trained.engine.zero_stage == 0:
            moment = trained.engine.engine.optimizer.state[parameter]["exp_avg"]
        else:
            moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        found[name] = moment.detach().reshape(-1).numpy().copy()
    return found


@dataclass
class Outcome:
    """Metrics and gradients of the first step; losses of all steps, and the weights after them."""

    metrics: Metrics
    gradients: Arrays
    losses: list[float]
    weights: Arrays


def train(trained: PolicyWorker, batches: Sequence[SFTBatch]) -> Outcome:
    metrics = trained.train_sft(batches[0])
    gradients = {name: moment / (1 - BETA_1) for name, moment in first_moments(trained).items()}
    losses = [metrics["sft/loss"], *[trained.train_sft(each)["sft/loss"] for each in batches[1:]]]
    return Outcome(metrics, gradients, losses, weights_of(trained))


def plain(model: ModelSection, optimizer: OptimizerSection, batches: Sequence[SFTBatch]) -> Outcome:
    """The same steps with one row at a time, all logits, and nothing of this project."""
    network = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    adam = torch.optim.AdamW(
        network.parameters(), lr=optimizer.learning_rate, betas=(BETA_1, 0.95), weight_decay=0.0
    )
    losses, norms, gradients = [], [], []
    for each in batches:
        total = torch.zeros(())
        for ids, mask in zip(each.tokens, each.is_target, strict=True):
            tokens, is_target = torch.tensor(ids.tolist()), torch.tensor(mask.tolist())
            logits = network(tokens[None]).logits[0, :-1]
            total = total + F.cross_entropy(logits, tokens[1:], reduction="none")[is_target[1:]].sum()
        loss = total / int(each.is_target.values.sum())
        adam.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), optimizer.max_grad_norm)))
        gradients.append({name: p.grad.reshape(-1).numpy().copy() for name, p in network.named_parameters()})
        adam.step()
    weights = {name: p.detach().numpy() for name, p in network.named_parameters()}
    return Outcome({"sft/loss": losses[0], "policy/grad_norm": norms[0]}, gradients[0], losses, weights)


def distance(found: Arrays, expected: Arrays) -> float:
    """Largest over parameters of |found - expected| / |expected|, in the norm of each parameter."""
    assert found.keys() == expected.keys()
    return max(
        float(np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name]))
        for name in expected
    )


BATCHES = (batch(0), batch(1))


def assert_equal_outcomes(found: Outcome, expected: Outcome) -> None:
    assert distance(found.gradients, expected.gradients) < 1e-6
    assert found.metrics["sft/loss"] == pytest.approx(expected.metrics["sft/loss"], rel=1e-6)
    assert found.metrics["policy/grad_norm"] == pytest.approx(expected.metrics["policy/grad_norm"], rel=1e-5)
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert distance(found.weights, expected.weights) < 2e-6


@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("split", BUDGETS)
def test_one_rank_is_plain_pytorch(model: ModelSection, zero_stage: int, split: str) -> None:
    found = train(worker(model, zero_stage, BUDGETS[split]), BATCHES)
    assert_equal_outcomes(found, plain(model, NO_CLIPPING, BATCHES))


@pytest.mark.parametrize("zero_stage", STAGES)
def test_clipping_takes_the_norm_of_the_whole_gradient(model: ModelSection, zero_stage: int) -> None:
    """The norm that is reported is the one before clipping; the gradient that Adam sees is clipped."""
    found = train(worker(model, zero_stage, BUDGETS["2x4"], CLIPPING), BATCHES)
    expected = plain(model, CLIPPING, BATCHES)
    assert expected.metrics["policy/grad_norm"] > 10 * CLIPPING.max_grad_norm
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in found.gradients.values()))
    assert norm == pytest.approx(CLIPPING.max_grad_norm, rel=1e-4)
    assert_equal_outcomes(found, expected)


def train_on_two_ranks(
    world: World, model: ModelSection, folder: Path
) -> dict[tuple[int, str], tuple[Outcome, bool]]:
    """All stages and splits, and a resumed update; runs on each of two ranks."""
    found = {}
    for zero_stage in STAGES:
        for split, optimizer in (("1x8", NO_CLIPPING), ("8x1", NO_CLIPPING), ("one row", CLIPPING)):
            # With one row there is nothing for the other rank: its micro-batch is empty.
            batches = BATCHES if split != "one row" else [each.select([0]) for each in BATCHES]
            trained = worker(model, zero_stage, BUDGETS.get(split, 64), optimizer, world)
            outcome = train(trained, batches)
            resumes = split != "8x1" or is_resumed_alike(trained, model, folder / str(zero_stage), world)
            found[zero_stage, split] = outcome, resumes
    return found


def is_resumed_alike(trained: PolicyWorker, model: ModelSection, folder: Path, world: World) -> bool:
    """Whether the next update of a new worker that loads the state is that of the old, to the last bit."""
    trained.save_state(folder)
    expected = trained.train_sft(batch(2))
    resumed = worker(model, trained.engine.zero_stage, BUDGETS["8x1"], NO_CLIPPING, world)
    resumed.load_state(folder)
    metrics = resumed.train_sft(batch(2))
    ours, theirs = weights_of(resumed), weights_of(trained)
    return metrics == expected and all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_two_ranks_are_plain_pytorch(model: ModelSection, tmp_path: Path) -> None:
    """Uneven lengths, any split, a rank without rows; gradient norms; and bit-exact checkpoints."""
    first, second = run_ranks(train_on_two_ranks, 2, tmp_path, model, tmp_path)
    expected = {
        "1x8": plain(model, NO_CLIPPING, BATCHES),
        "one row": plain(model, CLIPPING, [each.select([0]) for each in BATCHES]),
    }
    expected["8x1"] = expected["1x8"]
    assert len(first) == 4 * 3
    for (zero_stage, split), (outcome, is_resumed) in first.items():
        assert_equal_outcomes(outcome, expected[split])
        assert is_resumed, f"ZeRO {zero_stage}"
        other, _ = second[zero_stage, split]
        assert other.metrics == outcome.metrics, "ranks agree"


@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_a_resumed_update_is_the_same_to_the_last_bit(
    model: ModelSection, tmp_path: Path, zero_stage: int, precision: str
) -> None:
    schedule = OptimizerSection(learning_rate=1e-3, lr_scheduler="cosine", warmup_steps=2, weight_decay=0.1)
    trained = worker(model, zero_stage, 120, schedule, precision=precision)
    for seed in range(3):
        trained.train_sft(batch(seed))
    trained.save_state(tmp_path)
    torch.manual_seed(7)
    expected = [trained.train_sft(batch(seed)) for seed in (3, 4)]

    resumed = worker(model, zero_stage, 120, schedule, precision=precision)
    resumed.load_state(tmp_path)
    assert [resumed.train_sft(batch(seed)) for seed in (3, 4)] == expected
    ours, theirs = weights_of(resumed), weights_of(trained)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_random_state_is_part_of_a_checkpoint(model: ModelSection, tmp_path: Path) -> None:
    trained = worker(model, 0)
    trained.train_sft(batch())
    torch.manual_seed(3)
    np.random.seed(3)
    trained.save_state(tmp_path)
    drawn = torch.rand(3), np.random.rand(3)
    trained.load_state(tmp_path)
    assert torch.equal(torch.rand(3), drawn[0])
    assert np.array_equal(np.random.rand(3), drawn[1])


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_no_checkpoint_there(model: ModelSection, tmp_path: Path, zero_stage: int) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no state there"):
        worker(model, zero_stage).load_state(tmp_path)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_damaged_checkpoint(model: ModelSection, tmp_path: Path, zero_stage: int) -> None:
    trained = worker(model, zero_stage)
    trained.train_sft(batch())
    trained.save_state(tmp_path)
    for path in tmp_path.rglob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=f"{tmp_path}: damaged"):
        worker(model, zero_stage).load_state(tmp_path)


@pytest.mark.parametrize(("saved", "loaded"), [(0, 1), (1, 0), (1, 3), (3, 1)])
def test_a_checkpoint_of_another_zero_stage_is_refused(
    model: ModelSection, tmp_path: Path, saved: int, loaded: int
) -> None:
    trained = worker(model, saved)
    trained.train_sft(batch())
    trained.save_state(tmp_path)
    with pytest.raises(CheckpointError, match=f"saved by 1 rank.* ZeRO {saved}.* ZeRO {loaded}"):
        worker(model, loaded).load_state(tmp_path)


def learning_rates(model: ModelSection, scheduler: str, warmup: int) -> list[float]:
    optimizer = OptimizerSection(learning_rate=1.0 - 1e-9, lr_scheduler=scheduler, warmup_steps=warmup)
    trained = PolicyWorker(
        model, worker_spec(TrainingSection(precision="float32"), optimizer, single_world(), total_steps=6)
    )
    row = batch(lengths=[4])
    return [trained.train_sft(row)["policy/learning_rate"] for _ in range(7)]


@pytest.mark.parametrize(
    ("scheduler", "warmup", "factors"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1, 1]),
        ("constant", 3, [1 / 3, 2 / 3, 1, 1, 1, 1, 1]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
        ("linear", 2, [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4, 0]),
        ("cosine", 2, [1 / 2, 1, 1, 0.8535534, 0.5, 0.1464466, 0]),
    ],
)
def test_schedules_by_hand(model: ModelSection, scheduler: str, warmup: int, factors: list[float]) -> None:
    """The rate of each of 6 planned steps, and of one too many."""
    assert learning_rates(model, scheduler, warmup) == pytest.approx(factors, abs=1e-6)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_matrices_decay_and_norms_do_not(model: ModelSection, zero_stage: int) -> None:
    """AdamW takes lr * weight_decay * weight from a decayed weight, whatever the gradient."""
    start = weights_of(worker(model, 0))
    rate, decay = 1e-2, 0.5
    ended = []
    for weight_decay in (0.0, decay):
        trained = worker(
            model, zero_stage, optimizer=OptimizerSection(learning_rate=rate, weight_decay=weight_decay)
        )
        trained.train_sft(batch())
        ended.append(weights_of(trained))
    for name, weight in start.items():
        taken = ended[0][name] - ended[1][name]
        expected = rate * decay * weight if weight.ndim >= 2 else np.zeros_like(weight)
        np.testing.assert_allclose(taken, expected, atol=2e-7, err_msg=name)


def test_mixed_precision_keeps_float32_weights_and_is_close(model: ModelSection) -> None:
    exact = train(worker(model, 1), BATCHES)
    mixed_worker = worker(model, 1, precision="mixed")
    mixed = train(mixed_worker, BATCHES)
    assert {weight.dtype for weight in mixed.weights.values()} == {np.dtype(np.float32)}
    assert mixed.metrics["sft/loss"] == pytest.approx(exact.metrics["sft/loss"], rel=5e-3)
    assert mixed.metrics["sft/loss"] != exact.metrics["sft/loss"]
    assert 1e-4 < distance(mixed.gradients, exact.gradients) < 0.1


def test_gradient_checkpointing_changes_nothing(model: ModelSection) -> None:
    plainly = train(worker(model, 1), BATCHES)
    checkpointed = train(worker(model, 1, gradient_checkpointing=True), BATCHES)
    assert_equal_outcomes(checkpointed, plainly)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_packing_changes_nothing(model: ModelSection, zero_stage: int) -> None:
    packed = train(worker(model, zero_stage, BUDGETS["2x4"], packing=True), BATCHES)
    assert_equal_outcomes(packed, plain(model, NO_CLIPPING, BATCHES))
