"""A policy trained on preferences by real workers: against plain transformers, any split, any rank count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from rlhf_ray.config.schema import ModelSection, OptimizerSection, PreferenceSection, TrainingSection
from rlhf_ray.data.unpaired import unpaired
from rlhf_ray.engines.deepspeed_engine import World
from rlhf_ray.loops.reference_answers import AnsweredInEveryStep, ReferenceCache
from rlhf_ray.loops.supervised import SupervisedLoop, evaluate_labelled, evaluate_pairs, pair_tokens
from rlhf_ray.roles import Done
from rlhf_ray.types import LabelledAnswers, Metrics, Ragged, ReferencedPairs
from rlhf_ray.workers.frozen import ReferenceWorker
from rlhf_ray.workers.preference import PreferenceWorker
from tests.fakes import PowerCut, Watcher, cut_power
from tests.local_roles import CPU, LocalPreferenceTrainer, LocalReference, logged, stage_run, weights_of
from tests.ranks import EXACT, run_ranks, worker_spec
from tests.tiny import tiny_model_folder

FAST = OptimizerSection(learning_rate=3e-3)
PAIRED = ("dpo", "ipo", "hinge", "orpo", "simpo")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    """A reference with other weights."""
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("other"), seed=1)))


def pairs(count: int = 6) -> ReferencedPairs:
    """Chosen answers contain token 50, rejected ones token 60; lengths differ; all end in EOS, the pad."""
    generator = np.random.default_rng(1)
    prompts = [generator.integers(100, 290, generator.integers(2, 9)) for _ in range(count)]
    answers = [
        [[*prompt, *generator.integers(100, 290, generator.integers(1, 6)), token, 2] for prompt in prompts]
        for token in (50, 60)
    ]
    zeros = np.zeros(count, dtype=np.float32)
    return ReferencedPairs(
        prompt_lengths=np.array([len(prompt) for prompt in prompts]),
        chosen=Ragged.from_rows(answers[0], np.int32),
        rejected=Ragged.from_rows(answers[1], np.int32),
        margin=zeros,
        soft_label=np.linspace(1, 1, count, dtype=np.float32),
        ref_chosen=zeros,
        ref_rejected=zeros,
    )


def section(algorithm: str, **options: object) -> PreferenceSection:
    return PreferenceSection.model_validate({"algorithm": algorithm, **options})


def exact(budget: int, packing: bool = False, zero_stage: int = 0) -> TrainingSection:
    changes = {"tokens_per_micro_batch": budget, "packing": packing, "zero_stage": zero_stage}
    return EXACT.model_copy(update=changes)


def trainer(
    model: ModelSection, algorithm: str, training: TrainingSection = EXACT, **options: object
) -> PreferenceWorker:
    return PreferenceWorker(model, worker_spec(training, FAST), section(algorithm, **options))


def reference(model: ModelSection, training: TrainingSection = EXACT) -> ReferenceWorker:
    return ReferenceWorker(model, training, CPU, threads=1)


@torch.no_grad()
def slow_logprobs(model: ModelSection, rows: Ragged, prompt_lengths: np.ndarray) -> torch.Tensor:
    """Row by row, by the plain library."""
    network = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    found = []
    for row, prompt in zip(rows, prompt_lengths, strict=True):
        ids = torch.tensor(row.tolist())
        logprobs = network(ids[None]).logits[0].log_softmax(-1)
        found.append(logprobs[:-1].gather(1, ids[1:, None])[prompt - 1 :].sum())
    return torch.stack(found)


@pytest.mark.parametrize("budget", [1, 60, 4096])
@pytest.mark.parametrize("packing", [False, True])
def test_dpo_by_plain_transformers(
    model: ModelSection, other: ModelSection, budget: int, packing: bool
) -> None:
    training = exact(budget, packing)
    batch = reference(other, training).answer(pairs())
    lengths = batch.prompt_lengths
    sides = [
        slow_logprobs(which, rows, lengths)
        for which in (model, other)
        for rows in (batch.chosen, batch.rejected)
    ]
    np.testing.assert_allclose(batch.ref_chosen, sides[2].numpy(), rtol=1e-5)
    np.testing.assert_allclose(batch.ref_rejected, sides[3].numpy(), rtol=1e-5)
    worker = trainer(model, "dpo", training, beta=0.2)
    rewards = [0.2 * (sides[0] - sides[2]), 0.2 * (sides[1] - sides[3])]
    for found, expected in zip(worker.score_pairs(batch), rewards, strict=True):
        np.testing.assert_allclose(found.values, expected.numpy(), rtol=1e-4, atol=1e-5)
        assert found.lengths.tolist() == [1] * 6
    metrics = worker.train_pairs(batch)
    expected_loss = -F.logsigmoid(rewards[0] - rewards[1]).mean().item()
    assert metrics["preference/loss"] == pytest.approx(expected_loss, rel=1e-4)
    assert metrics["logps/chosen"] == pytest.approx(sides[0].mean().item(), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx((rewards[0] - rewards[1]).mean().item(), rel=1e-4)


@pytest.mark.parametrize("algorithm", ["dpo", "ipo", "hinge"])
def test_the_first_step_starts_at_the_reference(model: ModelSection, algorithm: str) -> None:
    metrics = trainer(model, algorithm).train_pairs(reference(model).answer(pairs()))
    for name in ("chosen", "rejected", "margins"):
        assert abs(metrics[f"rewards/{name}"]) < 1e-6
    start = {"dpo": np.log(2), "ipo": 25.0, "hinge": 1.0}[algorithm]
    assert metrics["preference/loss"] == pytest.approx(start, abs=1e-6, rel=1e-6)
    assert metrics["policy/grad_norm"] > 0.01


def test_kto_starts_at_a_half_and_sees_the_mismatched_answers(
    model: ModelSection, other: ModelSection
) -> None:
    batch = reference(model).answer(unpaired(pairs(), 64))
    metrics = trainer(model, "kto").train_answers(batch)
    assert metrics["preference/kl"] < 1e-5
    assert metrics["preference/loss"] == pytest.approx(0.5, abs=1e-5)
    away = reference(other).answer(unpaired(pairs(), 64))
    mismatched = away.mismatched, away.prompt_lengths
    ratio = slow_logprobs(model, *mismatched) - slow_logprobs(other, *mismatched)
    rewards = slow_logprobs(model, away.answers, away.prompt_lengths) - torch.from_numpy(away.ref_answers)
    signs = torch.from_numpy(np.where(away.is_desirable, 1.0, -1.0))
    kl = max(0.0, ratio.mean().item())
    metrics = trainer(model, "kto", beta=0.05, desirable_weight=2.0).train_answers(away)
    assert metrics["preference/kl"] == pytest.approx(kl, rel=1e-4)
    weights = torch.where(signs > 0, 2.0, 1.0)
    expected = (weights * (1 - torch.sigmoid(0.05 * signs * (rewards - kl)))).mean().item()
    assert metrics["preference/loss"] == pytest.approx(expected, rel=1e-5)


def step(
    model: ModelSection, algorithm: str, training: TrainingSection, world: World | None = None
) -> tuple[dict[str, np.ndarray], Metrics]:
    """One optimizer step on rows whose reference is made up."""
    noise = np.random.default_rng(5).normal(-30, 5, (2, 12)).astype(np.float32)
    spec = worker_spec(training, FAST, world)
    worker = PreferenceWorker(model, spec, section(algorithm, beta=0.05))
    if algorithm == "kto":
        answers = unpaired(pairs(), 64).with_reference(noise[0], noise[1])
        metrics = worker.train_answers(answers)
    else:
        metrics = worker.train_pairs(pairs().with_reference(noise[0, :6], noise[1, :6]))
    return weights_of(worker), metrics


def assert_same_step(
    one: tuple[dict[str, np.ndarray], Metrics], two: tuple[dict[str, np.ndarray], Metrics]
) -> None:
    assert two[1] == pytest.approx(one[1], rel=1e-4, abs=1e-5)
    for name, weight in one[0].items():
        # Adam divides by the gradient's size: where that is rounding, the first step is too.
        np.testing.assert_allclose(two[0][name], weight, atol=3e-4, err_msg=name)


@pytest.mark.parametrize("algorithm", [*PAIRED, "kto"])
def test_micro_batches_do_not_matter(model: ModelSection, algorithm: str) -> None:
    assert_same_step(step(model, algorithm, exact(4096)), step(model, algorithm, exact(1)))


def steps_of_rank(
    world: World, model: ModelSection, zero_stage: int
) -> dict[str, tuple[dict[str, np.ndarray], Metrics]]:
    training = exact(60, zero_stage=zero_stage)
    return {name: step(model, name, training, world) for name in ("dpo", "kto")}


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_two_ranks_take_the_step_of_one(model: ModelSection, tmp_path: Path, zero_stage: int) -> None:
    ranks = run_ranks(steps_of_rank, 2, tmp_path, model, zero_stage)
    for name in ("dpo", "kto"):
        assert_same_step(step(model, name, exact(4096)), ranks[0][name])
        assert ranks[0][name][1] == ranks[1][name][1]


@pytest.mark.parametrize("algorithm", PAIRED)
def test_it_learns_what_is_preferred(model: ModelSection, algorithm: str) -> None:
    worker = trainer(model, algorithm)
    batch = reference(model).answer(pairs(12))
    for _ in range(25):
        last = worker.train_pairs(batch)
    found = evaluate_pairs(LocalPreferenceTrainer(worker), batch)
    assert found["eval/accuracy"] == last["rewards/accuracies"] == 1.0
    assert found["eval/margin"] > 0.05
    assert set(found) >= {"eval/length_baseline", "eval/calibration_error", "eval/num_pairs"}


def test_kto_learns_what_is_preferred(model: ModelSection) -> None:
    worker = trainer(model, "kto")
    compared = reference(model).answer(pairs(12))
    batch = reference(model).answer(unpaired(pairs(12), 64))
    for _ in range(25):
        worker.train_answers(batch)
    local = LocalPreferenceTrainer(worker)
    assert evaluate_pairs(local, compared)["eval/accuracy"] == 1.0
    found = evaluate_labelled(local, batch)
    assert found["eval/auc"] > 0.99 and found["eval/margin"] > 0.1 and found["eval/num_answers"] == 24


def test_a_cached_reference_says_what_a_live_one_does(
    model: ModelSection, other: ModelSection, tmp_path: Path
) -> None:
    frozen = LocalReference(reference(other))
    cache = ReferenceCache(tmp_path, "other")
    for rows in (pairs(), unpaired(pairs(), 64)):
        assert cache.read(rows) is None
        filled = cache.fill(rows, frozen)
        kept = cache.read(rows)
        assert kept is not None
        for ours, theirs, live in zip(
            kept.reference, filled.reference, frozen.answer(Done(rows)).result().reference, strict=True
        ):
            assert np.array_equal(ours, theirs)
            np.testing.assert_allclose(ours, live, rtol=1e-5)
    assert ReferenceCache(tmp_path, "another").read(pairs()) is None
    fewer = pairs().select([0, 1, 2])
    assert cache.read(fewer) is None
    assert len(list(tmp_path.iterdir())) == 2


def loop(
    models: tuple[ModelSection, ModelSection], folder: Path, cached: bool, watcher: Watcher | None = None
) -> tuple[SupervisedLoop[ReferencedPairs], PreferenceWorker]:
    """Args: models: the policy's and the reference's."""
    worker = trainer(models[0], "dpo")
    local = LocalPreferenceTrainer(worker)
    frozen = LocalReference(reference(models[1]))
    answered = frozen.answer(Done(pairs(8))).result()
    rows = answered if cached else pairs(8)
    made = SupervisedLoop(
        rows=rows,
        batch_size=4,
        total_steps=6,
        eval_every=None,
        model=local,
        train=local.train_pairs if cached else AnsweredInEveryStep(local, frozen).train_pairs,
        evaluate=lambda: evaluate_pairs(local, answered),
        num_tokens=pair_tokens,
        run=stage_run(folder, watcher, every=2),
    )
    return made, worker


def finished(made: SupervisedLoop[ReferencedPairs]) -> Metrics:
    try:
        return made()
    finally:
        made.run.close()


@pytest.mark.parametrize("cached", [True, False])
def test_resumed_equals_uninterrupted(
    model: ModelSection, other: ModelSection, tmp_path: Path, cached: bool
) -> None:
    models = model, other
    whole, uninterrupted = loop(models, tmp_path / "whole", cached)
    final = finished(whole)
    broken, _ = loop(models, tmp_path / "cut", cached, Watcher(5, cut_power))
    with pytest.raises(PowerCut):
        finished(broken)
    again, resumed = loop(models, tmp_path / "cut", cached)
    assert finished(again) == final
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    ours, theirs = weights_of(resumed), weights_of(uninterrupted)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_reference_that_answers_in_every_step_gives_the_same_run(
    model: ModelSection, other: ModelSection, tmp_path: Path
) -> None:
    runs = []
    for cached in (True, False):
        made, _ = loop((model, other), tmp_path / str(cached), cached)
        finished(made)
        runs.append(logged(tmp_path / str(cached)))
    for ours, theirs in zip(*runs, strict=True):
        assert {**ours, "stage": 0} == pytest.approx({**theirs, "stage": 0}, rel=1e-3, abs=1e-4)


def test_a_soft_label_lowers_the_lead_that_is_learned(model: ModelSection) -> None:
    leads = []
    for label in (1.0, 0.6):
        worker = trainer(model, "dpo")
        batch = reference(model).answer(replace(pairs(), soft_label=np.full(6, label, dtype=np.float32)))
        for _ in range(30):
            metrics = worker.train_pairs(batch)
        leads.append(metrics["rewards/margins"])
    assert leads[1] == pytest.approx(np.log(0.6 / 0.4), abs=0.15)
    assert leads[0] > 2 * leads[1]


def test_an_unpaired_batch_is_a_batch(model: ModelSection) -> None:
    batch = unpaired(pairs(), 64)
    assert isinstance(batch.select([3, 1]), LabelledAnswers)
    assert batch.is_desirable.tolist() == [True] * 6 + [False] * 6
    assert batch.answers[6].tolist() == pairs().rejected[0].tolist()
