"""Every claim, each in a process of its own, and one table of them.

rlhf-ray bench all --folder runs/bench
rlhf-ray bench all --from runs/bench --markdown

The folder gets, for each claim, NAME.json with every sample, NAME.log, and NAME/ for what it leaves behind;
and of all together all.json and all.png. A claim that breaks off is said so in its row, the others still run,
and the command ends with 1. One that misses its goal is a result like any other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.measure import environment
from benchmarks.paired import COLUMNS, Result, cells_of, open_console, plot_pairs, table_of
from launch.bench import benchmarks
from rlhf_ray.config.document import nearest
from rlhf_ray.errors import UserError

CLAIMS = (
    "rollout",
    "train",
    "train-padded",
    "logprobs",
    "sync",
    "overhead",
    "control-plane",
    "async",
    "async-sim",
    "end-to-end",
    "scale",
    "plan-memory",
)


@dataclass(frozen=True)
class Outcome:
    """
    Fields:
        results: of a claim, none if it broke off. failure: why it did, or None.
    """

    claim: str
    results: list[Result]
    failure: str | None = None

    @classmethod
    def read(cls, folder: Path, claim: str) -> Outcome | None:
        """What a claim left in the folder; None if it was not run."""
        record, log = folder / f"{claim}.json", folder / f"{claim}.log"
        if record.exists():
            rows = json.loads(record.read_text())["results"]
            return cls(claim, [Result.from_record(row) for row in rows])
        return cls(claim, [], f"{last_line(log)} (see {log})") if log.exists() else None


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


def chosen(only: Sequence[str], skip: Sequence[str]) -> list[str]:
    """The claims to run, in their order.

    Raises:
        UserError: there is no such claim.
    """
    for name in [*only, *skip]:
        if name not in CLAIMS:
            raise UserError(f"no claim {name} (there are {', '.join(CLAIMS)}){nearest(name, CLAIMS)}")
    return [name for name in CLAIMS if name in (only or CLAIMS) and name not in skip]


def check_present(claims: Sequence[str]) -> None:
    """Before the first starts: all of them take long.

    Raises:
        UserError: the module of a claim is missing.
    """
    missing = [name for name in claims if name not in benchmarks()]
    if missing:
        modules = ", ".join(f"benchmarks/{name.replace('-', '_')}.py" for name in missing)
        raise UserError(f"missing: {modules}; to run the others, --skip {' '.join(missing)}")


def command_of(claim: str, args: argparse.Namespace) -> list[str]:
    words = ["--folder", str(args.folder / claim), "--json", str(args.folder / f"{claim}.json")]
    words += ["--quick"] if args.quick else []
    words += [] if args.pairs is None else ["--pairs", str(args.pairs)]
    words += [] if args.model is None else ["--model", args.model]
    return [sys.executable, "-m", "launch", "bench", claim, *words]


def run_claim_alone(
    claim: str, command: Sequence[str], folder: Path, minutes: float, say: Callable[[str], None]
) -> Outcome:
    """In a process of its own, whose lines are said as they come and kept in its log."""
    (folder / f"{claim}.json").unlink(missing_ok=True)
    with (
        (folder / f"{claim}.log").open("w") as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        ) as process,
    ):
        deadline = threading.Timer(60 * minutes, process.terminate)
        deadline.start()
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            say(line.rstrip("\n"))
        exit_code = process.wait()
        was_late = not deadline.is_alive()
        deadline.cancel()
        if was_late:
            log.write(f"ended after {minutes:g} minutes\n")
    if exit_code:
        # What a claim wrote before it broke off is not its result.
        (folder / f"{claim}.json").unlink(missing_ok=True)
    found = Outcome.read(folder, claim)
    assert found is not None
    return found


def full_table(outcomes: Sequence[Outcome]) -> Table:
    table = table_of([])
    for outcome in outcomes:
        for result in outcome.results:
            table.add_row(*map(escape, cells_of(result)))
        if outcome.failure is not None:
            table.add_row(outcome.claim, *[""] * (len(COLUMNS) - 2), "failed")
    return table


def markdown_of(outcomes: Sequence[Outcome]) -> str:
    rows = [COLUMNS, ["---", "---:", "---:", "---", *["---:"] * 4, "---"]]
    for outcome in outcomes:
        rows += [cells_of(result) for result in outcome.results]
        if outcome.failure is not None:
            rows.append([outcome.claim, *[""] * (len(COLUMNS) - 2), "failed"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def show(outcomes: Sequence[Outcome], console: Console, markdown: bool) -> int:
    """Print the table, and why claims broke off. Returns the exit code."""
    if markdown:
        print(markdown_of(outcomes))
    else:
        console.print(full_table(outcomes))
    failures = [outcome for outcome in outcomes if outcome.failure is not None]
    for outcome in failures:
        print(f"{outcome.claim} failed: {outcome.failure}", file=sys.stderr)
    return 1 if failures else 0


def keep(outcomes: Sequence[Outcome], json_path: Path, plot_path: Path) -> None:
    results = [result for outcome in outcomes for result in outcome.results]
    record = {
        "environment": environment(),
        "results": [result.record() for result in results],
        "failures": {o.claim: o.failure for o in outcomes if o.failure is not None},
    }
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(record, indent=2) + "\n")
    plot_pairs(results, plot_path)


def run_all(args: argparse.Namespace, claims: Sequence[str], console: Console) -> list[Outcome]:
    check_present(claims)
    args.folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for claim in claims:
        console.rule(claim)
        outcomes.append(
            run_claim_alone(
                claim,
                command_of(claim, args),
                args.folder,
                args.minutes,
                lambda line: console.print(line, highlight=False, markup=False, no_wrap=True, crop=False),
            )
        )
        # After each: what is measured is not lost when the machine goes down.
        keep(outcomes, args.json or args.folder / "all.json", args.plot or args.folder / "all.png")
    console.rule("all")
    return outcomes


def read_all(folder: Path, claims: Sequence[str]) -> list[Outcome]:
    """
    Raises:
        UserError: there is none.
    """
    found = [outcome for claim in claims if (outcome := Outcome.read(folder, claim)) is not None]
    if not found:
        raise UserError(f"--from {folder}: no results there; run `rlhf-ray bench all --folder {folder}`")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rlhf-ray bench all",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(CLAIMS)}")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="little work: whether it runs, not how fast")
    parser.add_argument("--pairs", type=int, help="paired samples of each comparison")
    parser.add_argument("--model", help="instead of the embedded one")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=90, help="that a claim may take (%(default)s)")
    parser.add_argument("--json", type=Path, help="every sample; default: all.json in the folder")
    parser.add_argument("--plot", type=Path, help="a PNG; default: all.png in the folder")
    parser.add_argument("--from", type=Path, dest="source", metavar="FOLDER", help="run nothing: show these")
    parser.add_argument("--markdown", action="store_true", help="the table for a README")
    args = parser.parse_args(argv)
    console = open_console()
    claims = chosen(args.only, args.skip)
    outcomes = read_all(args.source, claims) if args.source else run_all(args, claims, console)
    return show(outcomes, console, args.markdown)


if __name__ == "__main__":
    raise SystemExit(main())
