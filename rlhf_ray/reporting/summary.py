"""The closing report: tables and before/after examples, in the terminal and as `report.md`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rlhf_ray.reporting.evaluation import (
    Comparison,
    EvalRecord,
    Pair,
    Summary,
    load_records,
    order_by_improvement,
    pair_records,
    save_records,
    with_interval,
    with_margin,
)
from rlhf_ray.reporting.figures import compact, duration, fenced, key_figures, printable, shortened
from rlhf_ray.reporting.revisions import REVISIONS_FILE, read_revisions, render_revisions
from rlhf_ray.reporting.run_folder import RunFolder, RunRecord

CLOSING_HEADER = ("", "start", "end", "change", "end wins")
_STATUS_STYLES = {
    "done": "green",
    "failed": "red",
    "interrupted": "yellow",
    "running": "cyan",
    "not started": "dim",
}


@dataclass(frozen=True)
class Example:
    """caption: why this pair was chosen, with its numbers."""

    caption: str
    start: EvalRecord
    end: EvalRecord


def closing_rows(summary: Summary) -> list[tuple[str, str, str, str, str]]:
    """The closing table's cells, under `CLOSING_HEADER`; the same for the terminal and for Markdown."""
    rows = []
    for name, found in summary["rewards"].items():
        win = found["win_rate"]
        wins = f"{win['mean']:.0%} [{100 * win['low']:.0f}, {100 * win['high']:.0f}]" if win["n"] else "-"
        rows.append((name, *_comparison_cells(found), wins))
    if not math.isnan(summary["kl"]["end"]["mean"]):  # measured: there is a reference
        rows.append(("KL", *_comparison_cells(summary["kl"]), ""))
    rows.append(("length", *_comparison_cells(summary["length"]), ""))
    cut = summary["truncated"]
    rows.append(("cut off", f"{cut['start']['mean']:.0%}", f"{cut['end']['mean']:.0%}", _points(cut), ""))
    diversity = summary["distinct_2"]
    rows.append(("distinct-2", compact(diversity["start"]), compact(diversity["end"]), "", ""))
    return rows


def closing_notes(summary: Summary) -> list[str]:
    """What the table's columns mean, in a few words."""
    trained = [name for name, found in summary["rewards"].items() if found["trained"]]
    watched = [name for name, found in summary["rewards"].items() if not found["trained"]]
    notes = [
        f"{summary['prompts']} held-out prompts, 95 % intervals. End wins: share of prompts, ties half. KL "
        "in nats, length in tokens. Distinct-2: different word pairs over all, on equal amounts of text."
    ]
    if watched:
        notes.append(f"Trained on: {', '.join(trained)}. Watched only: {', '.join(watched)}.")
    if summary["unpaired"]:
        notes.append(f"{summary['unpaired']} answers have no counterpart at the other end and are left out.")
    return notes


def choose_examples(
    summary: Summary, start: Sequence[EvalRecord], end: Sequence[EvalRecord]
) -> list[Example]:
    """Three pairs that are typical, not flattering: the two of median change and the worst.

    Change is by the first watched source (the gold score) where there is one, else by the first trained one.
    """
    sources = sorted(summary["rewards"], key=lambda name: summary["rewards"][name]["trained"])
    if not sources:
        return []
    ordered = order_by_improvement(pair_records(start, end), sources[0])
    middle = (len(ordered) - 1) // 2
    chosen = {middle: "typical", middle + 1: "typical", 0: "worst"}
    return [
        Example(_caption(kind, sources[0], ordered[position]), *ordered[position])
        for position, kind in chosen.items()
        if position < len(ordered)
    ]


def save_closing(
    folder: RunFolder, summary: Summary, start: Sequence[EvalRecord], end: Sequence[EvalRecord]
) -> None:
    """Write `eval.jsonl` and `report.md`, and the summary into `run.json`."""
    save_records(folder.eval_path, start, end)
    folder.report_path.write_text(closing_markdown(summary, start, end), encoding="utf-8")
    folder.record_summary(summary)


def render_closing(
    console: Console, summary: Summary, start: Sequence[EvalRecord], end: Sequence[EvalRecord]
) -> None:
    """Print the table of start against end, warnings if there are signs of reward hacking, and examples."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for position, title in enumerate(CLOSING_HEADER):
        table.add_column(title, justify="right" if position else "left")
    for row in closing_rows(summary):
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    console.print()
    for note in closing_notes(summary):
        console.print(Text(note, style="dim"))
    for warning in summary["warnings"]:
        console.print(Text(f"Warning: {printable(warning)}", style="yellow"))
    for example in choose_examples(summary, start, end):
        console.print()
        console.print(Text(example.caption, style="bold"))
        grid = Table.grid(padding=(0, 2))
        for label, text in _texts(example).items():
            grid.add_row(Text(label, style="dim"), Text(printable(shortened(text))))
        console.print(Padding(grid, (0, 0, 0, 2)))


def closing_markdown(summary: Summary, start: Sequence[EvalRecord], end: Sequence[EvalRecord]) -> str:
    """The same as `render_closing`, with the examples in full."""
    lines = ["# Start against end", "", _markdown_row(CLOSING_HEADER), "|---|---:|---:|---:|---:|"]
    lines += [_markdown_row(row) for row in closing_rows(summary)]
    lines += ["", *closing_notes(summary)]
    lines += [f"\n**Warning:** {warning}" for warning in summary["warnings"]]
    for example in choose_examples(summary, start, end):
        lines += ["", f"## {example.caption}"]
        for label, text in _texts(example).items():
            lines += ["", f"{label}:", "", fenced(printable(text))]
    return "\n".join(lines) + "\n"


def render_run(path: Path | str, console: Console | None = None) -> None:
    """Print what the run in the folder `path` did: its stages, start against end where that was measured, and
    revised answers where there are some.

    Raises:
        DataError: the folder holds no run.
    """
    console = Console() if console is None else console
    root = RunFolder(path)
    record = root.read()
    folders = [root.stage(name) for name in record.stages] or [root]
    records = [folder.read() if folder.run_path.exists() else None for folder in folders]
    console.print(
        Text.assemble((str(root.path), "bold"), "  ", _status(record.status), f"  {duration(record.seconds)}")
    )
    if record.error:
        console.print(Text(printable(record.error), style="red"))
    console.print()
    console.print(_stage_table(record.stages or [record.name], records))
    for folder, stage in zip(folders, records, strict=True):
        if stage is not None and stage.summary:
            console.print()
            console.print(Text(f"{stage.name}: start against end", style="bold"))
            render_closing(console, cast(Summary, stage.summary), *load_records(folder.eval_path))
        if stage is not None and (folder.path / REVISIONS_FILE).exists():
            console.print()
            console.print(Text(f"{stage.name}: answers and their revisions", style="bold"))
            render_revisions(console, read_revisions(folder.path / REVISIONS_FILE))


def _stage_table(names: Sequence[str], records: Sequence[RunRecord | None]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for title in ("stage", "status", "time", "key figures"):
        table.add_column(title, justify="right" if title == "time" else "left")
    for name, record in zip(names, records, strict=True):
        if record is None:
            table.add_row(Text(name), _status("not started"), "", "")
        else:
            # A result is what the stage reached; its last step's speed is none.
            reached = {name: value for name, value in record.metrics.items() if not name.startswith("perf/")}
            figures = Text("  ".join(key_figures(record.name, reached)))
            table.add_row(Text(name), _status(record.status), duration(record.seconds), figures)
    return table


def _status(status: str) -> Text:
    return Text(status, style=_STATUS_STYLES[status])


def _comparison_cells(found: Comparison) -> tuple[str, str, str]:
    return with_margin(found["start"]), with_margin(found["end"]), with_interval(found["difference"], "+")


def _points(found: Comparison) -> str:
    """A difference of shares, in percentage points."""
    mean, low, high = (100 * found["difference"][name] for name in ("mean", "low", "high"))
    return f"{mean:+.0f} [{low:.0f}, {high:.0f}]"


def _caption(kind: str, source: str, pair: Pair) -> str:
    start, end = (record.rewards[source] for record in pair)
    return f"{kind.capitalize()} change: {source} {compact(start)} to {compact(end)}"


def _texts(example: Example) -> dict[str, str]:
    return {
        "prompt": example.start.prompt,
        "start": example.start.response or "(empty)",
        "end": example.end.response or "(empty)",
    }


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
