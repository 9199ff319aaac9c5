"""A reward model on human preferences (Anthropic's HH-RLHF, harmless): held-out accuracy over several seeds.

    rlhf-ray bench reward-hh --data PATH_TO_PAIRS.jsonl.gz --seeds 0 1 2

Without --data the dataset is the hub's. Each seed splits anew, by the first human turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from benchmarks.measure import run_seeds, seeds_parser, train_seed


@dataclass(frozen=True)
class SeedResult:
    seed: int
    minutes: float
    accuracy: float
    length_baseline: float
    held_out_pairs: int
    margin: float
    calibration_error: float
    loss: float


def measure_seed(seed: int, folder: Path, overrides: Sequence[str]) -> SeedResult:
    measured, run = train_seed("configs/reward-hh.yaml", seed, folder, overrides)
    final = run.stage("reward").metrics[-1]
    return SeedResult(
        seed=seed,
        minutes=measured.seconds / 60,
        accuracy=float(final["eval/accuracy"]),
        length_baseline=float(final["eval/length_baseline"]),
        held_out_pairs=int(final["eval/num_pairs"]),
        margin=float(final["eval/margin"]),
        calibration_error=float(final["eval/calibration_error"]),
        loss=float(final["eval/loss"]),
    )


def table_of(results: Sequence[SeedResult]) -> Table:
    table = Table(title="reward model on human pairs (HH-RLHF harmless), held-out")
    for column in (
        "seed",
        "minutes",
        "pairs",
        "accuracy",
        "longer wins",
        "margin",
        "calibration error",
        "loss",
    ):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            str(r.seed),
            f"{r.minutes:.1f}",
            str(r.held_out_pairs),
            f"{r.accuracy:.1%}",
            f"{r.length_baseline:.1%}",
            f"{r.margin:.2f}",
            f"{r.calibration_error:.3f}",
            f"{r.loss:.3f}",
        )
    mean = np.mean([r.accuracy for r in results])
    spread = np.std([r.accuracy for r in results], ddof=1) if len(results) > 1 else 0.0
    baseline = np.mean([r.length_baseline for r in results])
    table.add_section()
    table.add_row("mean", "", "", f"{mean:.1%} ± {spread:.1%}", f"{baseline:.1%}", "", "", "")
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = seeds_parser("reward-hh", __doc__)
    parser.add_argument("--data", type=Path, help="JSONL of chosen and rejected dialogues")
    args = parser.parse_args(argv)
    overrides = [*([f"reward.dataset.path={args.data.resolve()}"] if args.data else []), *args.overrides]
    return run_seeds(args, measure_seed, table_of, overrides)


if __name__ == "__main__":
    raise SystemExit(main())
