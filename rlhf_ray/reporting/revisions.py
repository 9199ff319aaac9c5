"""What became of each answer that a model criticised and revised: kept readable, and summed up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, cast

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rlhf_ray.reporting.figures import fenced, printable, shortened
from rlhf_ray.reporting.files import Json, dump_line, read_lines, write_text
from rlhf_ray.types import Message, Metrics

REVISIONS_FILE = "constitution.jsonl"
NUM_EXAMPLES = 3

Outcome = Literal["used", "unchanged", "empty", "cut", "too long"]
"""used: trained on. unchanged: the last revision is the first answer. empty: an answer, critique or revision
has no text. cut: the last revision reached the length limit. too long: the conversation outgrew the model."""
OUTCOMES: tuple[Outcome, ...] = ("used", "unchanged", "empty", "cut", "too long")


@dataclass(frozen=True)
class RevisionRound:
    """Fields: principle: its id."""

    principle: str
    critique: str = ""
    revision: str = ""


@dataclass(frozen=True)
class Revision:
    """An answer on its way through critiques and revisions.

    Fields:
        prompt: the conversation up to the answer.
        finished: the newest answer ended by itself.
        outcome: None while it is on its way.
    """

    prompt_id: int
    sample_id: int
    prompt: tuple[Message, ...]
    answer: str = ""
    rounds: tuple[RevisionRound, ...] = ()
    finished: bool = False
    outcome: Outcome | None = None

    @property
    def final(self) -> str:
        """The newest answer."""
        revised = [past.revision for past in self.rounds if past.revision]
        return revised[-1] if revised else self.answer

    def closed(self) -> Revision:
        """With what became of it."""
        if self.outcome is not None:
            return self
        if self.final.strip() == self.answer.strip():
            return replace(self, outcome="unchanged")
        return replace(self, outcome="used" if self.finished else "cut")


def write_revisions(path: Path, revisions: Sequence[Revision]) -> None:
    write_text(path, "".join(dump_line({**asdict(r), "final": r.final}) for r in revisions))


def read_revisions(path: Path) -> list[Revision]:
    """Raises: DataError: the file is missing or damaged."""
    return [_revision(row) for row in read_lines(path)]


def _revision(row: dict[str, Json]) -> Revision:
    fields = {name: value for name, value in row.items() if name != "final"}
    rounds = cast(list[dict[str, str]], fields.pop("rounds"))
    prompt = cast(list[Message], fields.pop("prompt"))
    return Revision(
        **fields,  # type: ignore[arg-type]
        prompt=tuple(prompt),
        rounds=tuple(RevisionRound(**past) for past in rounds),
    )


def revision_metrics(revisions: Sequence[Revision]) -> Metrics:
    """`constitution/answers`, and the share of each outcome."""
    counts = Counter(revision.outcome for revision in revisions)
    shares = {
        f"constitution/{outcome.replace(' ', '_')}": counts[outcome] / len(revisions) for outcome in OUTCOMES
    }
    return {"constitution/answers": float(len(revisions)), **shares}


def choose_revisions(revisions: Sequence[Revision]) -> list[Revision]:
    """A few that were trained on, evenly spread: typical, not flattering."""
    used = [revision for revision in revisions if revision.outcome == "used"]
    count = min(NUM_EXAMPLES, len(used))
    return [used[(2 * number + 1) * len(used) // (2 * count)] for number in range(count)]


def revisions_note(revisions: Sequence[Revision]) -> str:
    counts = Counter(revision.outcome for revision in revisions)
    parts = [f"{outcome} {counts[outcome] / len(revisions):.0%}" for outcome in OUTCOMES if counts[outcome]]
    return f"{len(revisions)} answers were revised: {', '.join(parts)}."


def revisions_markdown(revisions: Sequence[Revision]) -> str:
    """The note, and the examples in full."""
    lines = ["# Answers and their revisions", "", revisions_note(revisions)]
    for number, revision in enumerate(choose_revisions(revisions), start=1):
        lines += ["", f"## Example {number}"]
        for label, text in _texts(revision):
            lines += ["", f"{label}:", "", fenced(printable(text))]
    return "\n".join(lines) + "\n"


def render_revisions(console: Console, revisions: Sequence[Revision]) -> None:
    console.print(Text(revisions_note(revisions), style="dim"))
    for revision in choose_revisions(revisions):
        grid = Table.grid(padding=(0, 2))
        for label, text in _texts(revision):
            grid.add_row(Text(label, style="dim"), Text(printable(shortened(text))))
        console.print()
        console.print(Padding(grid, (0, 0, 0, 2)))


def _texts(revision: Revision) -> list[tuple[str, str]]:
    texts = [("prompt", revision.prompt[-1]["content"]), ("answer", revision.answer)]
    for past in revision.rounds:
        texts += [(f"critique ({past.principle})", past.critique), ("revision", past.revision)]
    return texts
