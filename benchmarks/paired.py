"""Two ways of doing the same work, compared so that the machine's moods cancel.

After warm-ups the arms run interleaved in blocks A B B A (A is the baseline), so that each of ours stands
beside one of the baseline's and a drift of the machine's speed falls on both. Of a block come two paired
ratios, and from its two runs of the baseline a control: where the control of the whole series is outside 0.97
to 1.03 the machine was not steady enough, and the result is void. The figure is the median of the paired
ratios; its interval is a percentile bootstrap over the pairs (Efron 1979).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, Self, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.drawing import drawn
from benchmarks.measure import environment

STEADY = (0.97, 1.03)
RESAMPLES = 10_000


Bound = Literal[">=", "<="]


@dataclass(frozen=True)
class Goal:
    """What a ratio, or a value without a baseline, should be."""

    bound: Bound
    limit: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """What `str` wrote."""
        written, limit = text.split()
        return cls(next(bound for bound in get_args(Bound) if bound == written), float(limit))

    def is_met(self, value: float) -> bool:
        return value >= self.limit if self.bound == ">=" else value <= self.limit

    def __str__(self) -> str:
        return f"{self.bound} {self.limit:g}"


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Fields:
        claim: the benchmark's name; case: what of it was measured, "" if there is only one thing.
        unit: of ours and baseline. ours, baseline: every sample, in the order of the runs; baseline is empty
            for a value that has none.
        figures: what the goal is about: ratios of the pairs, or ours itself where there is no baseline.
        controls: ratios of the baseline's two runs in a block.
        notes: anything else that was counted; kept in the JSON.
    """

    claim: str
    case: str
    unit: str
    ours: list[float]
    baseline: list[float]
    figures: list[float]
    goal: Goal | None = None
    controls: list[float] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)

    @property
    def figure(self) -> float:
        return float(np.median(self.figures))

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by bootstrap of the median."""
        figures = np.asarray(self.figures)
        draws = np.random.default_rng(0).integers(0, len(figures), (RESAMPLES, len(figures)))
        low, high = np.percentile(np.median(figures[draws], axis=1), [2.5, 97.5])
        return float(low), float(high)

    @property
    def control(self) -> float:
        return float(np.median(self.controls)) if self.controls else math.nan

    @property
    def is_void(self) -> bool:
        return bool(self.controls) and not STEADY[0] <= self.control <= STEADY[1]

    @property
    def verdict(self) -> str:
        if self.is_void:
            return "void"
        if self.goal is None:
            return ""
        return "met" if self.goal.is_met(self.figure) else "missed"

    def record(self) -> dict[str, object]:
        low, high = self.interval
        goal = None if self.goal is None else str(self.goal)
        control = self.control if self.controls else None
        derived = {"figure": self.figure, "low": low, "high": high, "control": control}
        return {**asdict(self), **derived, "goal": goal, "verdict": self.verdict}

    @classmethod
    def from_record(cls, record: dict[str, object]) -> Self:
        """What `record` wrote."""
        own = {each.name: record[each.name] for each in fields(cls)}
        goal = own.pop("goal")
        return cls(goal=None if goal is None else Goal.parse(str(goal)), **own)  # type: ignore[arg-type]


def compare(
    claim: str,
    ours: Callable[[], float],
    baseline: Callable[[], float],
    *,
    unit: str,
    goal: Goal | None = None,
    case: str = "",
    pairs: int = 6,
    warmups: int = 2,
    say: Callable[[str], None] = lambda line: None,
    notes: dict[str, object] | None = None,
) -> Result:
    """Run both arms in turn and compare what they return: seconds, bytes, tokens a second, ...

    Args:
        pairs: rounded up to an even number, two a block. warmups: runs of each arm that are not counted.
        say: told of every sample.
    """
    arms = {"ours": ours, "baseline": baseline}
    samples: dict[str, list[float]] = {"ours": [], "baseline": []}
    figures: list[float] = []
    controls: list[float] = []
    for _ in range(warmups):
        for arm in arms.values():
            arm()
    for block in range(-(-pairs // 2)):
        found: dict[str, list[float]] = {"ours": [], "baseline": []}
        for name in ("baseline", "ours", "ours", "baseline"):
            found[name].append(arms[name]())
            say(f"{claim} {case} block {block + 1}: {name} {found[name][-1]:.4g} {unit}")
        figures += [a / b for a, b in zip(found["ours"], found["baseline"], strict=True)]
        controls.append(found["baseline"][0] / found["baseline"][1])
        for name, values in found.items():
            samples[name] += values
    return Result(
        claim, case, unit, samples["ours"], samples["baseline"], figures, goal, controls, notes or {}
    )


def single(
    claim: str,
    values: Sequence[float],
    *,
    unit: str,
    goal: Goal | None = None,
    case: str = "",
    notes: dict[str, object] | None = None,
) -> Result:
    """A row for a value that needs no baseline."""
    return Result(claim, case, unit, list(values), [], list(values), goal, [], notes or {})


@dataclass(frozen=True)
class Options:
    """
    Fields:
        quick: little work and few pairs: whether it runs, not how fast.
        model: a model folder, a hub name, a .gguf file, or null for the embedded model.
        folder: for whatever a measurement leaves behind.
    """

    quick: bool
    pairs: int
    model: str | None
    folder: Path
    say: Callable[[str], None]

    @property
    def warmups(self) -> int:
        return 1 if self.quick else 2


Measure = Callable[[Options], list[Result]]


def run_claim(
    name: str,
    about: str | None,
    measure: Measure,
    argv: Sequence[str] | None,
    plot: Callable[[Sequence[Result], Path], None] | None = None,
) -> int:
    """The command line of one claim: measure, keep every sample, print the table, draw."""
    parser = argparse.ArgumentParser(
        prog=f"rlhf-ray bench {name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    args = parser.parse_args(argv)
    console = open_console()
    with tempfile.TemporaryDirectory() as temporary:
        results = measure(options_of(args, args.folder or Path(temporary), console))
    write_results(args.json, results)
    if args.plot:
        (plot or plot_pairs)(results, args.plot)
    console.print(table_of(results))
    return 0


def open_console() -> Console:
    """As wide as the terminal; in a file or a pipe, wide enough for the table."""
    return Console(width=None if sys.stdout.isatty() else 140)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="little work: whether it runs, not how fast")
    parser.add_argument("--pairs", type=int, default=6, help="paired samples of each comparison")
    parser.add_argument("--model", help="instead of the embedded one")
    parser.add_argument("--folder", type=Path, help="keep here what is left behind")
    parser.add_argument("--json", type=Path, help="every sample")
    parser.add_argument("--plot", type=Path, help="a PNG")


def options_of(args: argparse.Namespace, folder: Path, console: Console) -> Options:
    folder.mkdir(parents=True, exist_ok=True)
    pairs = min(args.pairs, 2) if args.quick else args.pairs
    return Options(args.quick, pairs, args.model, folder, lambda line: console.print(line, highlight=False))


def write_results(path: Path | None, results: Sequence[Result]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"environment": environment(), "results": [result.record() for result in results]}
        path.write_text(json.dumps(record, indent=2) + "\n")


COLUMNS = ("", "ours", "baseline", "unit", "ratio", "95 %", "goal", "control", "verdict")


def cells_of(result: Result) -> tuple[str, ...]:
    """A row of the table, one text a column."""
    low, high = result.interval
    has_baseline = bool(result.baseline)
    return (
        f"{result.claim} {result.case}".strip(),
        f"{np.median(result.ours):.4g}",
        f"{np.median(result.baseline):.4g}" if has_baseline else "",
        result.unit,
        f"{result.figure:.3f}" if has_baseline else "",
        f"{low:.3g}-{high:.3g}",
        "" if result.goal is None else str(result.goal),
        f"{result.control:.3f}" if result.controls else "",
        result.verdict,
    )


def table_of(results: Sequence[Result]) -> Table:
    table = Table(title="ours against the baseline, medians; the ratio is of pairs")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("", "unit", "verdict") else "right")
    for result in results:
        table.add_row(*cells_of(result))
    return table


def plot_pairs(results: Sequence[Result], path: Path) -> None:
    """The ratios of every comparison, with the interval of their median and the goal."""

    compared = [result for result in results if result.baseline]
    with drawn(path, (7, 1 + 0.5 * max(1, len(compared)))) as (axis,):
        for row, result in enumerate(compared):
            axis.plot(result.figures, [row] * len(result.figures), "o", color="tab:blue", alpha=0.4, ms=4)
            axis.plot(result.interval, [row, row], "-", color="tab:blue", lw=3)
            if result.goal is not None:
                axis.plot([result.goal.limit], [row], "|", color="tab:red", ms=16, mew=2)
        axis.set_yticks(range(len(compared)), [f"{r.claim} {r.case}".strip() for r in compared])
        axis.axvline(1, color="0.6", lw=1)
        axis.set(xlabel="ours / baseline; red: the goal")
        axis.invert_yaxis()
