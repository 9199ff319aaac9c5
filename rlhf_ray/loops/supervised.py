"""Learning from given examples: supervised fine-tuning, the reward model, preference optimisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from rlhf_ray.algorithms.preference_losses import calibration, length_baseline
from rlhf_ray.data.cursor import Cursor
from rlhf_ray.loops.checkpoints import restored_cursor, restored_step
from rlhf_ray.loops.stage_run import StageRun
from rlhf_ray.roles import Done, PairScorer, Pending, PreferenceTrainer, Trained
from rlhf_ray.types import LabelledAnswers, Metrics, PairBatch, Rows, SFTBatch

BatchT = TypeVar("BatchT", bound=Rows)
PairsT = TypeVar("PairsT", bound=PairBatch)


@dataclass(frozen=True)
class SupervisedLoop(Generic[BatchT]):
    """
    Fields:
        train: one optimizer step on a batch. evaluate: metrics on held-out rows, `eval/...`.
        num_tokens: of a batch, for the speed.
        total_steps: see `total_steps`.
    """

    rows: BatchT
    batch_size: int
    total_steps: int
    eval_every: int | None
    model: Trained
    train: Callable[[Pending[BatchT]], Pending[Metrics]]
    evaluate: Callable[[], Metrics]
    num_tokens: Callable[[BatchT], int]
    run: StageRun

    def __call__(self) -> Metrics:
        """Run all steps, or those that are left; returns the final held-out metrics."""
        run = self.run
        cursor, start = Cursor(len(self.rows), run.seed), 0
        if saved := run.checkpoints.latest():
            folder, state = saved
            cursor, start = restored_cursor(state, len(self.rows)), restored_step(state)
            run.checkpoints.load_models(folder, {"model": self.model})
        run.begin(start, self.total_steps)
        for step in range(start, self.total_steps):
            batch = self.rows.select(cursor.next(self.batch_size))
            metrics = self.train(Done(batch)).result()
            metrics |= {"perf/trained_tokens": float(self.num_tokens(batch)), "epoch": cursor.epoch}
            if self.is_evaluated(step + 1):
                metrics |= self.evaluate()
            run.log(step, metrics)
            run.save_or_stop(step + 1, {"model": self.model}, lambda: {"cursor": dict(cursor.state())})
        return {name: value for name, value in run.last_metrics.items() if name.startswith("eval/")}

    def is_evaluated(self, done: int) -> bool:
        return done == self.total_steps or (self.eval_every is not None and done % self.eval_every == 0)


def total_steps(num_rows: int, batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Optimizer steps so that every row is seen `num_epochs` times; the last may run into the next epoch."""
    steps = -(-num_rows * num_epochs // batch_size)
    return steps if max_steps is None else min(steps, max_steps)


def sft_tokens(batch: SFTBatch) -> int:
    return len(batch.tokens.values)


def pair_tokens(batch: PairBatch) -> int:
    return len(batch.chosen.values) + len(batch.rejected.values)


def labelled_tokens(batch: LabelledAnswers) -> int:
    return len(batch.answers.values)


def evaluate_pairs(model: PairScorer[PairsT], held_out: PairsT) -> Metrics:
    """Accuracy, margin and calibration on held-out pairs, beside the rule that the longer answer wins."""
    chosen, rejected = model.score_pairs(Done(held_out)).result()
    margins = chosen.values.astype(np.float64) - rejected.values.astype(np.float64)
    found = calibration(margins)
    lengths = [side.lengths - held_out.prompt_lengths for side in (held_out.chosen, held_out.rejected)]
    return {
        "eval/accuracy": float(((1 + np.sign(margins)) / 2).mean()),
        "eval/margin": float(margins.mean()),
        "eval/length_baseline": length_baseline(*lengths),
        "eval/calibration_error": found.expected_calibration_error,
        "eval/brier_score": found.brier_score,
        "eval/loss": found.log_loss,
        "eval/num_pairs": float(len(held_out)),
    }


def evaluate_labelled(model: PreferenceTrainer, held_out: LabelledAnswers) -> Metrics:
    """How far implicit rewards tell held-out desirable answers from undesirable ones.

    `eval/auc` is the probability that a desirable answer's reward is the higher one, ties half; 0.5 is
    chance. It and `eval/margin` are left out where only one kind was held out.
    """
    rewards = model.score_answers(Done(held_out)).result().values.astype(np.float64)
    good, bad = rewards[held_out.is_desirable], rewards[~held_out.is_desirable]
    metrics: Metrics = {"eval/num_answers": float(len(held_out))}
    if len(good) and len(bad):
        order = np.sign(good[:, None] - bad[None, :])
        metrics |= {
            "eval/auc": float(((1 + order) / 2).mean()),
            "eval/margin": float(good.mean() - bad.mean()),
        }
    return metrics
