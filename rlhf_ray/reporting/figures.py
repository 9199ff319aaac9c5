"""The few numbers of each stage that a person watches, and how numbers are written. The one home of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_SHOWN_CHARACTERS = 400


@dataclass(frozen=True)
class Figure:
    label: str
    metric: str
    kind: Literal["number", "count", "percent"] = "number"

    def show(self, value: float) -> str:
        if not math.isfinite(value):
            return f"{self.label} -"
        if self.kind == "percent":
            return f"{self.label} {value:.1%}"
        return f"{self.label} {value:.0f}" if self.kind == "count" else f"{self.label} {compact(value)}"


KEY_FIGURES: dict[str, tuple[Figure, ...]] = {
    "sft": (
        Figure("loss", "sft/loss"),
        Figure("held-out", "eval/loss"),
        Figure("tok/s", "perf/tokens_per_second", "count"),
    ),
    "constitution": (
        Figure("loss", "sft/loss"),
        Figure("held-out", "eval/loss"),
        Figure("used", "constitution/used", "percent"),
        Figure("unchanged", "constitution/unchanged", "percent"),
        Figure("tok/s", "perf/tokens_per_second", "count"),
    ),
    "preferences": (
        Figure("pairs", "preferences/pairs", "count"),
        Figure("agreement", "preferences/agreement", "percent"),
        Figure("order decides", "preferences/order_disagreement", "percent"),
        Figure("tok/s", "perf/tokens_per_second", "count"),
    ),
    "reward": (
        Figure("loss", "reward/loss"),
        Figure("accuracy", "reward/accuracy", "percent"),
        Figure("held-out", "eval/accuracy", "percent"),
    ),
    "preference": (
        Figure("loss", "preference/loss"),
        Figure("margin", "rewards/margins"),
        Figure("held-out", "eval/accuracy", "percent"),
    ),
    "online": (
        Figure("reward", "reward/mean"),
        Figure("gold", "reward/gold/mean"),
        Figure("KL", "kl/per_sequence"),
        Figure("length", "length/mean", "count"),
        Figure("tok/s", "perf/tokens_per_second", "count"),
    ),
}
"""Stage -> its figures, the most telling first: a narrow terminal shows the first ones."""


def key_figures(stage: str, metrics: Mapping[str, object]) -> list[str]:
    """Those of the stage's figures that the metrics hold, written out; `stage-2` has those of `stage`."""
    return [
        figure.show(float(value))
        for figure in KEY_FIGURES.get(stage.partition("-")[0], ())
        if isinstance(value := metrics.get(figure.metric), int | float)
    ]


def compact(value: float, sign: str = "") -> str:
    """Three significant digits (0.412, 12.3, 1234, 1.2e-07); a dash for what is not a number."""
    if not math.isfinite(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        decimals = 2 if value == 0 else min(3, max(0, 2 - math.floor(math.log10(abs(value)))))
        return f"{value:{sign}.{decimals}f}"
    return f"{value:{sign}.1e}"


def duration(seconds: float) -> str:
    """`3:07`, or `1:03:07` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def printable(text: str) -> str:
    """`text` without the control characters by which a model's answer could steer a terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text.expandtabs(4)
    )


def shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1].rstrip() + "…"


def fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest, run = 0, 0
    for character in text:
        run = run + 1 if character == "`" else 0
        longest = max(longest, run)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
