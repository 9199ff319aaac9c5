"""Human pairs (HH-RLHF, harmless), learned from with and without a reward model: held-out accuracy.

    rlhf-ray bench preference-hh --data PATH_TO_PAIRS.jsonl.gz --seeds 0 1 2 --algorithms dpo ipo \
        --plot docs/studies/preference-hh.png

The implicit reward of a policy that DPO or a relative of it trains, beside a reward model's score, both from
the embedded chat model, on the same training pairs and the same held-out ones: every seed splits anew, by the
first human turn. Without --data the dataset is the hub's. Overrides stand before the options; those of one of
the two stages reach that stage only, such as preference.optimizer.learning_rate=1.0e-5.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.drawing import drawn
from benchmarks.measure import seeds_parser, train_run, write_json
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.reporting.run_folder import RunFolder

Stage = Literal["preference", "reward"]

REWARD_MODEL = "reward model"
ALGORITHMS = ("dpo", "ipo", "hinge", "orpo", "simpo")
CONFIGS: dict[Stage, str] = {"preference": "configs/dpo.yaml", "reward": "configs/reward-hh.yaml"}
HUB_DATASET = "Anthropic/hh-rlhf"


@dataclass(frozen=True)
class Curve:
    """
    Fields:
        name: of the algorithm, or REWARD_MODEL. minutes: of the stage, over all resumptions.
        pairs: that had been trained on, at each evaluation. accuracy: there, on the held-out pairs.
        longer_wins: accuracy of the rule that the longer answer is the better one.
    """

    seed: int
    name: str
    minutes: float
    held_out_pairs: int
    longer_wins: float
    pairs: list[int]
    accuracy: list[float]


def stage_of(name: str) -> Stage:
    return "reward" if name == REWARD_MODEL else "preference"


def overrides_of(
    name: str, data: Path | None, eval_every: int, overrides: Sequence[str] = ()
) -> tuple[str, ...]:
    """What tells a run from the packaged configuration of its stage; what both stages must have alike, the
    split and the chat template, is written for both."""
    stage = stage_of(name)
    dataset = HUB_DATASET if data is None else data.resolve()
    same = (
        "model.chat_template=null",
        f"{stage}.dataset.path={dataset}",
        f"{stage}.held_out=200",
        f"{stage}.split_by=first_turn",
        f"{stage}.max_length=512",
        f"{stage}.num_epochs=1",
        f"{stage}.batch_size=16",
        f"{stage}.eval_every={eval_every}",
    )
    alone = ("pipeline=[preference]", "sft=null", "preferences=null", f"preference.algorithm={name}")
    others = tuple(f"{other}." for other in CONFIGS if other != stage)
    own = (word for word in overrides if not word.startswith(others))
    return (*(alone if stage == "preference" else ()), *same, *own)


def measure(name: str, seed: int, folder: Path, overrides: Sequence[str]) -> Curve:
    stage = stage_of(name)
    output = folder / f"seed-{seed}-{name.replace(' ', '-')}"
    done = train_run(CONFIGS[stage], output, [f"seed={seed}", *overrides])[1].stage(stage)
    record = RunFolder(done.folder).read()
    section = cast(dict[str, int], record.config[stage])
    evaluated = [row for row in done.metrics if "eval/accuracy" in row]
    return Curve(
        seed=seed,
        name=name,
        minutes=record.seconds / 60,
        held_out_pairs=int(evaluated[-1]["eval/num_pairs"]),
        longer_wins=float(evaluated[-1]["eval/length_baseline"]),
        pairs=[(int(row["step"]) + 1) * section["batch_size"] for row in evaluated],
        accuracy=[float(row["eval/accuracy"]) for row in evaluated],
    )


def check_same_pairs(curves: Sequence[Curve]) -> None:
    """Raises RlhfRayError: two methods were judged by different pairs of one seed."""
    for seed in {curve.seed for curve in curves}:
        judged = {(c.held_out_pairs, round(c.longer_wins, 6)) for c in curves if c.seed == seed}
        if len(judged) > 1:
            raise RlhfRayError(
                f"seed {seed}: the held-out pairs differ between the methods: {sorted(judged)}"
            )


def mean_curve(curves: Sequence[Curve]) -> tuple[list[int], list[float]]:
    """Over the seeds, at the numbers of pairs at which all of them were evaluated."""
    at = [dict(zip(curve.pairs, curve.accuracy, strict=True)) for curve in curves]
    shared = sorted(set.intersection(*(set(points) for points in at)))
    return shared, [float(np.mean([points[pairs] for points in at])) for pairs in shared]


def length_rule(curves: Sequence[Curve]) -> tuple[str, float]:
    """The better of the two rules that look at lengths alone, on the held-out pairs themselves."""
    longer = float(np.mean([curve.longer_wins for curve in curves]))
    return ("the longer answer wins", longer) if longer >= 0.5 else ("the shorter answer wins", 1 - longer)


def by_name(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    return {name: [c for c in curves if c.name == name] for name in dict.fromkeys(c.name for c in curves)}


def plot(curves: Sequence[Curve], path: Path) -> None:

    with drawn(path, (7, 4.2)) as (axis,):
        for number, (name, own) in enumerate(by_name(curves).items()):
            colour = f"C{number}"
            for curve in own:
                axis.plot(curve.pairs, curve.accuracy, color=colour, alpha=0.25, lw=1)
            axis.plot(*mean_curve(own), "-o", color=colour, label=name, ms=4)
        rule, accuracy = length_rule(curves)
        axis.axhline(accuracy, color="k", ls="--", lw=1, label=rule)
        axis.set(xlabel="pairs trained on", ylabel="right about held-out pairs")
        axis.grid(alpha=0.3)
        axis.legend()


def table_of(curves: Sequence[Curve]) -> Table:
    table = Table(title="human pairs (HH-RLHF harmless): accuracy on held-out pairs")
    for column in ("", "seed", "minutes", "trained on", "held out", "accuracy"):
        table.add_column(column, justify="right" if column else "left")
    for name, own in by_name(curves).items():
        for c in own:
            held_out, accuracy = str(c.held_out_pairs), f"{c.accuracy[-1]:.1%}"
            table.add_row(name, str(c.seed), f"{c.minutes:.1f}", str(c.pairs[-1]), held_out, accuracy)
        last = [c.accuracy[-1] for c in own]
        spread = f" ± {np.std(last, ddof=1):.1%}" if len(last) > 1 else ""
        table.add_row(name, "mean", "", "", "", f"{np.mean(last):.1%}{spread}")
        table.add_section()
    rule, correct = length_rule(curves)
    table.add_row(rule, "mean", "", "", "", f"{correct:.1%}")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = seeds_parser("preference-hh", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, help="JSONL of chosen and rejected dialogues")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=["dpo", "ipo"])
    parser.add_argument("--eval-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--plot", type=Path)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    curves: list[Curve] = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in args.seeds:
            for name in (REWARD_MODEL, *args.algorithms):
                words = overrides_of(name, args.data, args.eval_every, args.overrides)
                curves.append(measure(name, seed, args.folder or Path(temporary), words))
                write_json(args.json, [asdict(curve) for curve in curves])  # a later run may fail
                check_same_pairs(curves)
    if args.plot:
        plot(curves, args.plot)
    Console().print(table_of(curves))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
