"""Supervised training with real workers: resumed equals uninterrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from rlhf_ray.config.schema import ModelSection, OptimizerSection, RewardSection, TrainingSection
from rlhf_ray.errors import CheckpointError, Interrupted
from rlhf_ray.loops.stage_run import StageRun
from rlhf_ray.loops.supervised import SupervisedLoop, evaluate_pairs, pair_tokens, sft_tokens, total_steps
from rlhf_ray.roles import Done
from rlhf_ray.types import Metrics, PairBatch, Ragged, SFTBatch
from rlhf_ray.workers.policy import PolicyWorker
from rlhf_ray.workers.scalar import RewardTrainerWorker
from tests.fakes import PowerCut, Watcher, cut_power
from tests.local_roles import LocalPolicy, LocalRewardTrainer, logged, stage_run, weights_of
from tests.ranks import worker_spec
from tests.tiny import tiny_model_folder

STEPS = 5
BATCH_SIZE = 2
SCHEDULE = OptimizerSection(learning_rate=1e-3, lr_scheduler="linear", warmup_steps=2)
Loop = SupervisedLoop[SFTBatch]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


def rows(count: int, seed: int = 0) -> SFTBatch:
    generator = np.random.default_rng(seed)
    tokens = Ragged.from_rows(
        [generator.integers(3, 290, n) for n in generator.integers(3, 20, count)], np.int32
    )
    return SFTBatch(tokens, tokens.with_values(np.arange(len(tokens.values)) % 3 > 0))


HELD_OUT = rows(3, seed=1)


def sft_loop(
    model: ModelSection, run: StageRun, training: TrainingSection, num_rows: int = 6
) -> tuple[Loop, PolicyWorker]:
    worker = PolicyWorker(model, worker_spec(training, SCHEDULE, total_steps=STEPS))
    policy = LocalPolicy(worker)
    loop = SupervisedLoop(
        rows=rows(num_rows),
        batch_size=BATCH_SIZE,
        total_steps=STEPS,
        eval_every=2,
        model=policy,
        train=policy.train_sft,
        evaluate=lambda: {
            name.replace("sft/", "eval/"): value
            for name, value in policy.evaluate_sft(Done(HELD_OUT)).result().items()
        },
        num_tokens=sft_tokens,
        run=run,
    )
    return loop, worker


def finished(loop: Loop) -> Metrics:
    try:
        return loop()
    finally:
        loop.run.close()


TRAININGS = pytest.mark.parametrize(
    "training",
    [
        TrainingSection(precision="float32", zero_stage=0),
        TrainingSection(precision="mixed", zero_stage=2, tokens_per_micro_batch=16),
    ],
    ids=["float32", "mixed"],
)


def assert_same(resumed: PolicyWorker, uninterrupted: PolicyWorker) -> None:
    ours, theirs = weights_of(resumed), weights_of(uninterrupted)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@TRAININGS
@pytest.mark.parametrize("stop_after", [1, 3])
def test_interrupted_and_resumed(
    model: ModelSection, tmp_path: Path, training: TrainingSection, stop_after: int
) -> None:
    """6 rows in batches of 2: after step 3 the cursor stands at the boundary of an epoch."""
    whole, uninterrupted = sft_loop(model, stage_run(tmp_path / "whole"), training)
    final = finished(whole)

    stopped = tmp_path / "stopped"
    interrupt = Event()
    watcher = Watcher(stop_after, interrupt.set)
    first, _ = sft_loop(model, stage_run(stopped, watcher, interrupt=interrupt), training)
    with pytest.raises(Interrupted, match=f"stopped after step {stop_after}"):
        finished(first)
    second, resumed = sft_loop(model, stage_run(stopped), training)
    assert finished(second) == final
    assert_same(resumed, uninterrupted)
    assert logged(stopped) == logged(tmp_path / "whole")
    assert len(logged(stopped)) == STEPS


def test_a_power_cut_costs_the_steps_since_the_checkpoint(model: ModelSection, tmp_path: Path) -> None:
    training = TrainingSection(precision="float32", zero_stage=1)
    whole, uninterrupted = sft_loop(model, stage_run(tmp_path / "whole"), training)
    finished(whole)
    cut = tmp_path / "cut"
    first, _ = sft_loop(model, stage_run(cut, Watcher(4, cut_power), every=2), training)
    with pytest.raises(PowerCut):
        finished(first)
    assert [row["step"] for row in logged(cut)] == [0, 1, 2, 3]
    second, resumed = sft_loop(model, stage_run(cut, every=2), training)
    finished(second)
    assert_same(resumed, uninterrupted)
    assert logged(cut) == logged(tmp_path / "whole")


def test_resumed_at_the_very_end(model: ModelSection, tmp_path: Path) -> None:
    """Everything is trained and only the model was not saved: the metrics are there all the same."""
    training = TrainingSection(precision="float32", zero_stage=0)
    first, before = sft_loop(model, stage_run(tmp_path, every=STEPS), training)
    final = finished(first)
    second, after = sft_loop(model, stage_run(tmp_path, every=STEPS), training)
    assert finished(second) == final
    assert final.keys() == {"eval/loss", "eval/perplexity", "eval/token_accuracy"}
    assert_same(after, before)


def test_another_dataset_is_refused(model: ModelSection, tmp_path: Path) -> None:
    training = TrainingSection(precision="float32", zero_stage=0)
    first, _ = sft_loop(model, stage_run(tmp_path, Watcher(2, cut_power), every=1), training)
    with pytest.raises(PowerCut):
        finished(first)
    second, _ = sft_loop(model, stage_run(tmp_path, every=1), training, num_rows=7)
    with pytest.raises(CheckpointError, match="6 usable rows, and now there are 7"):
        finished(second)


def test_evaluation_learning_and_the_last_step(model: ModelSection, tmp_path: Path) -> None:
    loop, _ = sft_loop(model, stage_run(tmp_path), TrainingSection(precision="float32", zero_stage=0))
    finished(loop)
    log = logged(tmp_path)
    assert [index for index, row in enumerate(log) if "eval/loss" in row] == [1, 3, 4]
    assert [row["epoch"] for row in log] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])
    assert log[3]["sft/loss"] < log[0]["sft/loss"], "the same rows in their second epoch"
    assert [row["policy/learning_rate"] for row in log] == pytest.approx(
        [0.5e-3, 1e-3, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3]
    )
    lengths = rows(6).tokens.lengths
    assert sum(row["perf/trained_tokens"] for row in log[:3]) == lengths.sum()


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "num_epochs", "max_steps", "expected"),
    [(10, 5, 1, None, 2), (11, 5, 1, None, 3), (11, 5, 2, None, 5), (11, 5, 2, 4, 4), (3, 8, 1, 9, 1)],
)
def test_total_steps(
    num_rows: int, batch_size: int, num_epochs: int, max_steps: int | None, expected: int
) -> None:
    assert total_steps(num_rows, batch_size, num_epochs, max_steps) == expected


def test_a_reward_model_learns_and_resumes(model: ModelSection, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    prompts = [generator.integers(100, 290, 4).tolist() for _ in range(8)]
    pairs = PairBatch(
        prompt_lengths=np.full(8, 4),
        chosen=Ragged.from_rows([[*prompt, 50, 2] for prompt in prompts], np.int32),
        rejected=Ragged.from_rows([[*prompt, 60, 61, 2] for prompt in prompts], np.int32),
        margin=np.zeros(8, dtype=np.float32),
        soft_label=np.ones(8, dtype=np.float32),
    )

    def train(
        folder: Path, watch: Callable[[], Watcher] | None = None
    ) -> tuple[Metrics, RewardTrainerWorker]:
        worker = RewardTrainerWorker(
            model, worker_spec(optimizer=OptimizerSection(learning_rate=3e-3)), RewardSection()
        )
        trainer = LocalRewardTrainer(worker)
        loop = SupervisedLoop(
            rows=pairs,
            batch_size=4,
            total_steps=10,
            eval_every=None,
            model=trainer,
            train=trainer.train_pairs,
            evaluate=lambda: evaluate_pairs(trainer, pairs),
            num_tokens=pair_tokens,
            run=stage_run(folder, watch() if watch else None, every=5),
        )
        try:
            return loop(), worker
        finally:
            loop.run.close()

    final, uninterrupted = train(tmp_path / "whole")
    assert final["eval/accuracy"] == 1.0
    assert final["eval/length_baseline"] == 0.0
    with pytest.raises(PowerCut):
        train(tmp_path / "cut", lambda: Watcher(7, cut_power))
    again, resumed = train(tmp_path / "cut")
    assert again == final
    ours, theirs = weights_of(resumed), weights_of(uninterrupted)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert [row["perf/trained_tokens"] for row in logged(tmp_path / "cut")] == [4 * (6 + 7)] * 10
