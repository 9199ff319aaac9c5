"""What became of the rows that could not be used as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SHOWN = 3
"""Row numbers named for each reason."""


class UnusableRow(Exception):
    """This row cannot be used; the argument is the reason, the same words for every row that shares it."""


@dataclass(frozen=True)
class Skipped:
    """Reason -> positions (from 0, in the source) of the rows left out, and of rows used in part.

    Fields:
        rows: left out.
        truncated: used, but cut at the length limit.
    """

    rows: Mapping[str, Sequence[int]] = field(default_factory=dict)
    truncated: Sequence[int] = ()

    def __len__(self) -> int:
        """Number of rows left out."""
        return sum(self.counts.values())

    @property
    def counts(self) -> dict[str, int]:
        """Reason -> number of rows, most frequent first."""
        counts = {reason: len(positions) for reason, positions in self.rows.items()}
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def __add__(self, other: Skipped) -> Skipped:
        reasons = [*self.rows, *(reason for reason in other.rows if reason not in self.rows)]
        return Skipped(
            {reason: [*self.rows.get(reason, ()), *other.rows.get(reason, ())] for reason in reasons},
            [*self.truncated, *other.truncated],
        )

    def __str__(self) -> str:
        parts = [f"{len(self)} rows skipped"] if self.rows else []
        parts += [f"{count} {reason} ({_rows(self.rows[reason])})" for reason, count in self.counts.items()]
        if self.truncated:
            parts.append(f"{len(self.truncated)} rows cut at the length limit ({_rows(self.truncated)})")
        return "; ".join(parts) or "no rows skipped"


def _rows(positions: Sequence[int]) -> str:
    """People count rows from 1."""
    numbers = ", ".join(str(position + 1) for position in positions[:SHOWN])
    return f"{'rows' if len(positions) > 1 else 'row'} {numbers}{', …' if len(positions) > SHOWN else ''}"
