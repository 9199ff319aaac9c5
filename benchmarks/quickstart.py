"""The quickstart pipeline over several seeds: time, memory, and whether each stage did what it is for.

rlhf-ray bench quickstart --seeds 0 1 2 --json quickstart.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.measure import GIB, run_seeds, seeds_parser, train_seed
from rlhf_ray.reporting.run_folder import RunFolder


@dataclass(frozen=True)
class SeedResult:
    """Gold scores are on the held-out prompts; `gold_change` is the paired difference after PPO minus after
    SFT."""

    seed: int
    minutes: float
    peak_memory_gib: float
    stage_minutes: dict[str, float]
    sft_held_out_loss: float
    annotator_agreement: float
    reward_accuracy: float
    length_baseline: float
    held_out_pairs: int
    gold_before: dict[str, float]
    gold_after: dict[str, float]
    gold_change: dict[str, float]
    proxy_change: dict[str, float]
    win_rate: dict[str, float]
    kl: float


def measure_seed(seed: int, folder: Path, overrides: Sequence[str]) -> SeedResult:
    measured, run = train_seed("configs/quickstart.yaml", seed, folder, overrides)
    sft, reward = run.stage("sft").metrics[-1], run.stage("reward").metrics[-1]
    summary = run.stage("online").summary
    rewards = summary["rewards"]
    return SeedResult(
        seed=seed,
        minutes=measured.seconds / 60,
        peak_memory_gib=measured.peak_memory / GIB,
        stage_minutes={stage.name: _minutes(stage.folder) for stage in run.stages},
        sft_held_out_loss=float(sft["eval/loss"]),
        annotator_agreement=_final(run.stage("preferences").folder, "preferences/agreement"),
        reward_accuracy=float(reward["eval/accuracy"]),
        length_baseline=float(reward["eval/length_baseline"]),
        held_out_pairs=int(reward["eval/num_pairs"]),
        gold_before=rewards["gold"]["start"],  # type: ignore[index]
        gold_after=rewards["gold"]["end"],  # type: ignore[index]
        gold_change=rewards["gold"]["difference"],  # type: ignore[index]
        proxy_change=rewards["proxy"]["difference"],  # type: ignore[index]
        win_rate=rewards["gold"]["win_rate"],  # type: ignore[index]
        kl=float(summary["kl"]["end"]["mean"]),  # type: ignore[index]
    )


def _minutes(folder: Path) -> float:
    return RunFolder(folder).read().seconds / 60


def _final(folder: Path, metric: str) -> float:
    return RunFolder(folder).read().metrics[metric]


def interval(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def table_of(results: Sequence[SeedResult]) -> Table:
    table = Table(title="quickstart: 135M model, held-out prompts, 95 % intervals")
    for column in (
        "seed",
        "minutes",
        "peak GiB",
        "RM accuracy",
        "longer wins",
        "gold after SFT",
        "gold after PPO",
        "change",
        "PPO wins",
        "KL",
    ):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            str(r.seed),
            f"{r.minutes:.1f}",
            f"{r.peak_memory_gib:.1f}",
            f"{r.reward_accuracy:.1%} of {r.held_out_pairs}",
            f"{r.length_baseline:.1%}",
            interval(r.gold_before),
            interval(r.gold_after),
            interval(r.gold_change),
            f"{r.win_rate['mean']:.0%}",
            f"{r.kl:.1f}",
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    args = seeds_parser("quickstart", __doc__).parse_args(argv)
    return run_seeds(args, measure_seed, table_of, args.overrides)


if __name__ == "__main__":
    raise SystemExit(main())
