"""What a person sees while a run goes on.

`open_progress` picks: a live display on a terminal, plain lines elsewhere, nothing for Python users. All
three are fed the same way, from outside the loops.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TextIO

from rich.console import Console, ConsoleDimensions
from rich.live import Live
from rich.text import Text

from rlhf_ray.reporting.board import Board, StageState
from rlhf_ray.reporting.figures import duration, printable
from rlhf_ray.types import Metrics

Clock = Callable[[], float]

PLAIN_INTERVAL = 5.0
"""Seconds between two lines of a stage where there is no terminal."""
_WIDEST_BAR, _NARROWEST_BAR = 24, 6


class Progress(Protocol):
    """Told of what happens, in order: `stage`, its `step`s, the next `stage`, and so on; then `close`."""

    def stage(self, name: str, total_steps: int) -> None:
        """A stage starts, or goes on to that many steps in all; the one before it is over."""
        ...

    def step(self, step: int, metrics: Metrics) -> None:
        """`step` steps of the stage are done now; a stage that is resumed starts beyond 1."""
        ...

    def message(self, text: str) -> None: ...

    def close(self) -> None:
        """The run is over; the running stage counts as done if all of its steps are, else as stopped."""
        ...


def open_progress(stages: Sequence[str], stream: TextIO, *, quiet: bool = False) -> Progress:
    """The display that fits.

    Args:
        stages: all that will run, in order.
        stream: where to show it: the terminal that `capture_library_output` yields.
    """
    if quiet:
        return QuietProgress()
    if stream.isatty():
        return LiveProgress(stages, Console(file=stream))
    return PlainProgress(stages, stream)


class QuietProgress:
    """Shows nothing; messages go to Python's logging."""

    def stage(self, name: str, total_steps: int) -> None:
        pass

    def step(self, step: int, metrics: Metrics) -> None:
        pass

    def message(self, text: str) -> None:
        logging.getLogger("rlhf_ray").info(text)

    def close(self) -> None:
        pass


class PlainProgress:
    """Lines for a file or a pipe: a stage's first and last step, and one every few seconds between."""

    def __init__(self, stages: Sequence[str], stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._board = Board(stages)
        self._stream = stream
        self._clock = clock
        self._last_line: float | None = None

    def stage(self, name: str, total_steps: int) -> None:
        if self._board.running is None or self._board.running.name != name:
            self._stop()
        now = self._clock()
        self._board.start(name, total_steps, now)
        self._last_line = None
        self._line(f"{name}: {total_steps} steps")

    def step(self, step: int, metrics: Metrics) -> None:
        now = self._clock()
        stage = self._board.step(step, metrics, now)
        is_due = self._last_line is None or now - self._last_line >= PLAIN_INTERVAL
        if is_due or step >= stage.total:
            self._last_line = now
            self._line(f"{stage.name} {' | '.join([_count(stage), *stage.figures, *_times(stage, now)])}")

    def message(self, text: str) -> None:
        self._line(printable(text))

    def close(self) -> None:
        self._stop()

    def _stop(self) -> None:
        stage = self._board.stop(self._clock())
        if stage is not None:
            self._line(f"{stage.name}: {' | '.join(_closing_parts(stage))}")

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class LiveProgress:
    """A few lines at the bottom of a terminal: one a stage, and the figures of the running one."""

    def __init__(self, stages: Sequence[str], console: Console, clock: Clock = time.monotonic) -> None:
        self._board = Board(stages)
        self._console = console
        self._clock = clock
        # The display is drawn from a thread of its own, so that the clock moves while a step takes minutes.
        self._lock = threading.Lock()
        self._live = Live(
            get_renderable=self._draw,
            console=console,
            refresh_per_second=4,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def stage(self, name: str, total_steps: int) -> None:
        with self._lock:
            self._board.start(name, total_steps, self._clock())

    def step(self, step: int, metrics: Metrics) -> None:
        with self._lock:
            self._board.step(step, metrics, self._clock())

    def message(self, text: str) -> None:
        self._console.print(Text(printable(text), style="dim"))

    def close(self) -> None:
        with self._lock:
            self._board.stop(self._clock())
        self._live.stop()

    def _draw(self) -> Text:
        # rich measures the standard streams, which may lead to the log file; the display's own stream counts.
        if self._console.file.isatty():
            self._console.size = ConsoleDimensions(*os.get_terminal_size(self._console.file.fileno()))
        with self._lock:
            return draw(
                self._board, self._console.width, self._clock(), ascii_only=self._console.options.ascii_only
            )


def draw(board: Board, width: int, now: float, *, ascii_only: bool = False) -> Text:
    """The display as lines that fit into `width` columns."""
    name_width = max((len(stage.name) for stage in board.stages), default=0)
    lines: list[Text] = []
    for stage in board.stages:
        mark, style = _mark(board, stage, ascii_only)
        line = Text.assemble(
            (mark, style), " ", (stage.name.ljust(name_width), "bold" if stage.is_running else ""), "  "
        )
        if stage.is_running:
            _append_bar(line, stage, now, width, ascii_only)
            lines += [
                line,
                Text(" " * (name_width + 4)).append(_joined(stage.figures, width - name_width - 4), "cyan"),
            ]
        elif stage.ended is not None:
            lines.append(line.append(_joined(_closing_parts(stage), width - line.cell_len)))
        else:
            lines.append(line.append("done earlier" if board.is_skipped(stage) else "waiting", "dim"))
    for line in lines:
        # One column stays free: some terminals wrap a line that fills them.
        line.truncate(width - 1, overflow="crop" if ascii_only else "ellipsis")
        line.rstrip()
    return Text("\n", no_wrap=True).join(lines)


def _mark(board: Board, stage: StageState, ascii_only: bool) -> tuple[str, str]:
    if stage.is_running:
        return (">" if ascii_only else "▸"), "bold cyan"
    if stage.is_complete or board.is_skipped(stage):
        return ("+" if ascii_only else "✓"), "green"
    if stage.ended is not None:
        return ("x" if ascii_only else "✗"), "red"
    return ("." if ascii_only else "·"), "dim"


def _append_bar(line: Text, stage: StageState, now: float, width: int, ascii_only: bool) -> None:
    """Append bar, count and times: what does not fit is left out, the bar first, then the times."""
    room = width - 1 - line.cell_len
    count, times = _count(stage), "  ".join(_times(stage, now))
    bar = min(_WIDEST_BAR, room - len(count) - len(times) - 4)
    if bar >= _NARROWEST_BAR:
        filled = bar * stage.done // max(1, stage.total)
        full, empty = ("#", "-") if ascii_only else ("━", "━")
        line.append(full * filled, "cyan").append(empty * (bar - filled), "bright_black").append("  ")
    line.append(count)
    if len(count) + 2 + len(times) <= room:
        line.append("  " + times, "dim")


def _joined(parts: Sequence[str], room: int) -> str:
    """The parts that fit, whole: a figure that is cut in the middle would be a wrong number."""
    text = ""
    for part in parts:
        longer = f"{text}  {part}" if text else part
        if len(longer) >= room:
            break
        text = longer
    return text


def _count(stage: StageState) -> str:
    return f"{stage.done}/{stage.total}"


def _times(stage: StageState, now: float) -> list[str]:
    elapsed = duration(stage.elapsed(now))
    if stage.done == 0:
        return [elapsed, "starting"]
    remaining = stage.remaining(now)
    return (
        [elapsed]
        if remaining is None or stage.done >= stage.total
        else [elapsed, f"left {duration(remaining)}"]
    )


def _closing_parts(stage: StageState) -> list[str]:
    assert stage.ended is not None
    took = duration(stage.elapsed(stage.ended))
    how = f"done in {took}" if stage.is_complete else f"stopped at {_count(stage)} after {took}"
    return [how, *stage.figures]
