"""Reward hacking made visible: gold reward against KL, for several KL coefficients and for best-of-n.

rlhf-ray bench overoptimisation --start runs/quickstart --plot docs/studies/overoptimisation.png

PPO is trained on the reward model (the proxy) with each coefficient, from the SFT model of a finished
quickstart run (which is made first where --start names none). Best-of-n takes the answer with the highest
proxy score of n samples of that SFT model; its KL is known: log n - (n - 1) / n (Stiennon et al. 2020,
appendix G). Where the proxy goes on rising and the gold reward does not, the policy pleases the model of
people and no longer people (Gao et al. 2022).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.drawing import drawn
from benchmarks.measure import train_run, write_json

SAMPLES = 64
BEST_OF = (1, 4, 16, 64)


@dataclass(frozen=True)
class Point:
    """Means over the held-out prompts; `kl` in nats an answer."""

    kl: float
    proxy: float
    gold: float


@dataclass(frozen=True)
class Curve:
    name: str
    points: list[Point]


def best_of_n(proxy: NDArray[np.float64], gold: NDArray[np.float64], n: int) -> Point:
    """Expected scores of the best by proxy of n samples, over all subsets of n of the samples drawn.

    The i-th smallest of N is the largest of a random n-subset with probability C(i - 1, n - 1) / C(N, n).

    Args:
        proxy, gold: [P, N] scores of N samples to each of P prompts.
    """
    num_samples = proxy.shape[1]
    chance = np.array([math.comb(i, n - 1) / math.comb(num_samples, n) for i in range(num_samples)])
    order = np.argsort(proxy, axis=1)
    expected = [(np.take_along_axis(scores, order, 1) * chance).sum(1).mean() for scores in (proxy, gold)]
    return Point(kl=math.log(n) - (n - 1) / n, proxy=float(expected[0]), gold=float(expected[1]))


def online_overrides(start: Path) -> list[str]:
    """The online stage alone, from the models of a finished run."""
    return [
        *("pipeline=[online]", "sft=null", "preferences=null", "reward=null", "model.chat_template=null"),
        f"model.path={(start / 'sft' / 'model').resolve()}",
        f"online.rewards.0.path={(start / 'reward' / 'model').resolve()}",
    ]


def ppo_curve(start: Path, folder: Path, coefficient: float, overrides: Sequence[str]) -> Curve:
    run = train_run(
        "configs/quickstart.yaml",
        folder / f"kl-{coefficient:g}",
        [*online_overrides(start), f"online.kl_coef={coefficient}", "online.eval_every=3", *overrides],
    )[1]
    stage = run.stage("online")
    rewards, kl = stage.summary["rewards"], stage.summary["kl"]
    ends = [
        Point(kl[side]["mean"], rewards["proxy"][side]["mean"], rewards["gold"][side]["mean"])  # type: ignore[index]
        for side in ("start", "end")
    ]
    during = [
        Point(float(row["eval/kl"]), float(row["eval/reward/proxy"]), float(row["eval/reward/gold"]))
        for row in stage.metrics
        if "eval/kl" in row
    ]
    return Curve(f"PPO, kl_coef {coefficient:g}", [ends[0], *during, ends[1]])


def best_of_curve(start: Path, folder: Path, overrides: Sequence[str]) -> Curve:
    """A single step of rejection sampling on the held-out prompts draws the samples and scores them."""
    output = folder / "best-of-n"
    num_prompts = 40
    words = [
        *online_overrides(start),
        "online.algorithm=raft",
        *("online.num_steps=1", "online.num_mini_batches=1", "online.dataset.split=test"),
        *(f"online.prompts_per_step={num_prompts}", f"online.num_generations={SAMPLES}"),
    ]
    train_run("configs/quickstart.yaml", output, [*words, *overrides])
    table = pq.read_table(output / "online" / "rollouts" / "step-000000.parquet")
    proxy, gold = (
        table[f"reward/{name}"].to_numpy().reshape(num_prompts, SAMPLES).astype(np.float64)
        for name in ("proxy", "gold")
    )
    return Curve("best of n", [best_of_n(proxy, gold, n) for n in BEST_OF])


def plot(curves: Sequence[Curve], path: Path) -> None:

    with drawn(path, (11, 4.2), widths=(1, 1), sharex=True) as axes:
        for curve in curves:
            style = "k--o" if curve.name == "best of n" else "-o"
            kl = [point.kl for point in curve.points]
            for axis, name in zip(axes, ("gold", "proxy"), strict=True):
                axis.plot(kl, [getattr(point, name) for point in curve.points], style, label=curve.name, ms=4)
        for axis, title in zip(
            axes, ("gold reward (what people want)", "proxy reward (trained on)"), strict=True
        ):
            axis.set(title=title, xlabel="KL to the SFT model, nats an answer")
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=8)


def table_of(curves: Sequence[Curve]) -> Table:
    table = Table(title="gold against KL on held-out prompts")
    for column in ("", "KL", "proxy", "gold"):
        table.add_column(column, justify="right" if column else "left")
    for curve in curves:
        for point in curve.points:
            table.add_row(curve.name, f"{point.kl:.2f}", f"{point.proxy:.2f}", f"{point.gold:.3f}")
        table.add_section()
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rlhf-ray bench overoptimisation", description=__doc__)
    parser.add_argument("--start", type=Path, help="output folder of a finished quickstart run")
    parser.add_argument("--coefficients", type=float, nargs="+", default=[0.0, 0.02, 0.05, 0.2])
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        start = args.start
        if start is None:
            start = folder / "start"
            train_run("configs/quickstart.yaml", start, ["pipeline=[sft,preferences,reward]", "online=null"])
        curves = [best_of_curve(start, folder, args.overrides)]
        for coefficient in args.coefficients:
            curves.append(ppo_curve(start, folder, coefficient, args.overrides))
            write_json(args.json, [asdict(curve) for curve in curves])
    if args.plot:
        plot(curves, args.plot)
    Console().print(table_of(curves))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
