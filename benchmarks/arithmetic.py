"""Learning sums of two small numbers from a rule that checks them: one task, several algorithms.

rlhf-ray bench arithmetic --algorithms grpo random ppo rloo --plot docs/studies/arithmetic.png

Every step is as many answers for each algorithm. `random` is GRPO on a reward that is drawn by lot: whatever
rises there is no learning. Accuracy is on questions that training has not seen, one sampled answer to each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.drawing import drawn
from benchmarks.measure import train_run, write_json

RANDOM = "random"
CONFIG = "configs/grpo-arithmetic.yaml"
REWARD = "reasoning_gym"


@dataclass(frozen=True)
class Curve:
    """
    Fields:
        samples: answers that had been trained on, at each evaluation, 0 first. accuracy: on unseen questions.
        reward: mean of each step's answers to training questions, by the rule.
    """

    name: str
    minutes: float
    samples: list[int]
    accuracy: list[float]
    reward: list[float]


def overrides_of(name: str) -> list[str]:
    """What tells the run from the configuration."""
    if name != RANDOM:
        return [f"online.algorithm={name}"]
    by_lot = "{type: function, name: lot, function: 'benchmarks.arithmetic:by_lot'}"
    rule = f"{{type: reasoning_gym, weight: 0, extract: '^\\s*(-?\\d+)', name: {REWARD}}}"
    return ["online.algorithm=grpo", f"online.rewards=[{by_lot}, {rule}]"]


def by_lot(prompts: Sequence[object], completions: Sequence[str], **columns: object) -> list[float]:
    """A reward that has nothing to do with the answer's meaning: a coin that its text decides."""
    return [float(zlib.crc32(f"{index} {text}".encode()) % 2) for index, text in enumerate(completions)]


def measure(name: str, folder: Path, overrides: Sequence[str]) -> Curve:
    measured, run = train_run(CONFIG, folder / name, [*overrides_of(name), *overrides])
    stage = run.stage("online")
    metrics = f"eval/reward/{REWARD}"
    during = [(index + 1, float(row[metrics])) for index, row in enumerate(stage.metrics) if metrics in row]
    ends = stage.summary["rewards"][REWARD]  # type: ignore[index]
    points = [(0, ends["start"]["mean"]), *during, (len(stage.metrics), ends["end"]["mean"])]
    per_step = int(stage.metrics[0]["perf/num_samples"])
    return Curve(
        name=name,
        minutes=measured.seconds / 60,
        samples=[step * per_step for step, _ in points],
        accuracy=[accuracy for _, accuracy in points],
        reward=[float(row[f"reward/{REWARD}/mean"]) for row in stage.metrics],
    )


def plot(curves: Sequence[Curve], path: Path) -> None:

    with drawn(path, (7, 4.2)) as (axis,):
        for curve in curves:
            style = "k--o" if curve.name == RANDOM else "-o"
            axis.plot(curve.samples, curve.accuracy, style, label=curve.name, ms=4)
        axis.set(xlabel="answers trained on", ylabel="right answers to unseen questions", ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend()


def table_of(curves: Sequence[Curve]) -> Table:
    table = Table(title="sums of two small numbers: right answers to unseen questions")
    for column in ("", "minutes", "answers", "start", "best", "end"):
        table.add_column(column, justify="right" if column else "left")
    for curve in curves:
        table.add_row(
            curve.name,
            f"{curve.minutes:.1f}",
            str(curve.samples[-1]),
            f"{curve.accuracy[0]:.0%}",
            f"{max(curve.accuracy):.0%}",
            f"{curve.accuracy[-1]:.0%}",
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rlhf-ray bench arithmetic", description=__doc__)
    parser.add_argument("--algorithms", nargs="+", default=["grpo", RANDOM, "ppo", "rloo", "reinforce_pp"])
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument(
        "--beside", type=Path, nargs="*", default=[], help="JSON of earlier curves to show too"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--overrides", nargs="*", default=[], help="key.path=value")
    args = parser.parse_args(argv)
    curves = [Curve(**curve) for path in args.beside for curve in json.loads(path.read_text())["result"]]
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.algorithms:
            curves.append(measure(name, args.folder or Path(temporary), args.overrides))
            write_json(args.json, [asdict(curve) for curve in curves])  # a later run may fail
    if args.plot:
        plot(curves, args.plot)
    Console().print(table_of(curves))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
