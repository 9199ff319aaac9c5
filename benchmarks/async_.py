"""Generation beside training: how much of the time that it can save is saved?

rlhf-ray bench async --json async.json

Both arms are whole runs over the same prompts and seeds and, since the learning rate is next to nothing, of
the same answers; engine and trainer have one thread each in both. The baseline is synchronous, and its steps
say how long generation (g) and everything else (t) take; with `online.max_lag: 1` a step could take
max(g, t). The figure is the speed-up over (g + t) / max(g, t).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.measure import train_run
from benchmarks.paired import Goal, Options, Result, compare, run_claim
from rlhf_ray.reporting.metrics_log import MetricsRow

CONFIG = "configs/grpo-arithmetic.yaml"
GOAL = Goal(">=", 0.9)
NUM_STEPS, QUICK_STEPS = 6, 4
SAME_WORK = 1.03
"""In bfloat16 an answer may take another turn where it is computed beside others."""
ONE_THREAD = [f"placement.{role}.threads=1" for role in ("policy", "engine", "reward")]
WORK = [
    "model.chat_template=embedded:chatml",
    "online.algorithm=dr_grpo",
    # Nearly every answer is as long as it may be.
    "online.dataset={path: 'embedded:prompts'}",
    "online.eval_dataset={path: 'embedded:prompts', split: test, limit: 2}",
    "online.rewards=[{type: length, max_tokens: 16}]",
    "online.max_prompt_length=300",
    "online.max_completion_length=64",
    "online.num_generations=4",
    "online.num_mini_batches=1",
    "online.optimizer.learning_rate=1e-12",
    "online.eval_every=null",
    "checkpoint.every=null",
    "sync.verify_first=0",
    "sync.verify_every=1000000",
    # Few answers at a time, so that one thread takes about as long to generate as one to train.
    "engine.max_num_seqs=8",
]
SIZE = ["online.prompts_per_step=6"]
QUICK_SIZE = ["online.prompts_per_step=2"]


@dataclass
class Runs:
    """
    Fields:
        ideals: (g + t) / max(g, t) of each synchronous run. parts: its g and t, seconds.
        tokens: generated in the steps that count.
    """

    options: Options
    number: itertools.count[int] = field(default_factory=itertools.count)
    ideals: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)

    def seconds_per_step(self, max_lag: int) -> float:
        """Of the steps that are neither the first, which has nothing to wait for yet, nor the last, beside
        which nothing is generated any more."""
        rows = self._rows(max_lag)[1:-1]
        self.tokens.append(sum(float(row["perf/generated_tokens"]) for row in rows))
        assert max(self.tokens) < SAME_WORK * min(self.tokens), f"not the same work: {self.tokens} tokens"
        step = sum(float(row["time/step"]) for row in rows) / len(rows)
        if max_lag == 0:
            generate = sum(float(row["time/generate"]) for row in rows) / len(rows)
            self.parts.append({"generate": generate, "rest": step - generate})
            self.ideals.append(step / max(generate, step - generate))
        return step

    def _rows(self, max_lag: int) -> list[MetricsRow]:
        quick = self.options.quick
        folder: Path = self.options.folder / f"run-{next(self.number)}-lag-{max_lag}"
        model = [] if self.options.model is None else [f"model.path={self.options.model}"]
        steps = QUICK_STEPS if quick else NUM_STEPS
        overrides = [
            *ONE_THREAD,
            *WORK,
            *(QUICK_SIZE if quick else SIZE),
            *model,
            f"online.num_steps={steps}",
            f"online.max_lag={max_lag}",
        ]
        _, run = train_run(CONFIG, folder, overrides)
        return list(run.stage("online").metrics)


def measure(options: Options) -> list[Result]:
    runs = Runs(options)
    compared = compare(
        "async",
        lambda: runs.seconds_per_step(1),
        lambda: runs.seconds_per_step(0),
        unit="s a step",
        goal=GOAL,
        pairs=options.pairs,
        warmups=0 if options.quick else 1,
        say=options.say,
    )
    ideals = runs.ideals[-len(compared.baseline) :]
    speedups = [1 / ratio for ratio in compared.figures]
    figures = [speedup / ideal for speedup, ideal in zip(speedups, ideals, strict=True)]
    notes: dict[str, object] = {
        "speedups": speedups,
        "ideals": ideals,
        "seconds": runs.parts,
        "tokens": runs.tokens,
    }
    return [replace(compared, figures=figures, notes=notes)]


def main(argv: Sequence[str] | None = None) -> int:
    return run_claim("async", __doc__, measure, argv)
