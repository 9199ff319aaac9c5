"""The displays, read as a person would: as text, at several widths, with a clock that the test moves."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from rlhf_ray.reporting.board import Board
from rlhf_ray.reporting.figures import KEY_FIGURES, compact, duration, key_figures, printable
from rlhf_ray.reporting.progress import LiveProgress, PlainProgress, QuietProgress, draw, open_progress

ONLINE = {
    "reward/mean": 0.4123,
    "reward/gold/mean": 0.31,
    "kl/per_sequence": 4.567,
    "length/mean": 45.3,
    "perf/tokens_per_second": 310.2,
    "policy/loss": 0.1,
}


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def board_in_the_middle() -> Board:
    """sft is done after 90 s; online has done 4 of 10 steps, 20 s each, after a start of 60 s."""
    board = Board(("sft", "reward", "online"))
    board.start("sft", 3, 0.0)
    board.step(3, {"sft/loss": 1.5}, 90.0)
    board.start("online", 10, 90.0)
    for step in range(1, 5):
        board.step(step, ONLINE, 130.0 + 20 * step)
    return board


def test_the_display_at_80_columns() -> None:
    assert draw(board_in_the_middle(), 80, 215.0).plain.splitlines() == [
        "✓ sft     done in 1:30  loss 1.50",
        "✓ reward  done earlier",
        "▸ online  ━━━━━━━━━━━━━━━━━━━━━━━━  4/10  2:05  left 1:55",
        "          reward 0.412  gold 0.310  KL 4.57  length 45  tok/s 310",
    ]


def test_the_bar_is_filled_in_proportion() -> None:
    line = draw(board_in_the_middle(), 80, 215.0, ascii_only=True).plain.splitlines()[2]
    assert line == "> online  #########---------------  4/10  2:05  left 1:55"


@pytest.mark.parametrize("width", [120, 80, 60, 44, 30, 20, 12])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(width: int) -> None:
    text = draw(board_in_the_middle(), width, 215.0)
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        console.print(text)
    assert len(capture.get().splitlines()) == 4
    assert max(map(len, text.plain.splitlines())) < width
    shown = text.plain.split("\n")[3].split("  ")
    assert {figure for figure in shown if figure.strip()} <= {
        "reward 0.412",
        "gold 0.310",
        "KL 4.57",
        "length 45",
        "tok/s 310",
    }


def test_a_narrow_terminal_loses_the_bar_then_the_times_then_figures() -> None:
    assert draw(board_in_the_middle(), 32, 215.0).plain.splitlines()[2:] == [
        "▸ online  4/10  2:05  left 1:55",
        "          reward 0.412",
    ]
    assert draw(board_in_the_middle(), 26, 215.0).plain.splitlines()[2] == "▸ online  4/10"


def test_time_left_is_the_pace_of_the_latest_steps_and_counts_down() -> None:
    board = Board(("sft",))
    stage = board.start("sft", 100, 0.0)
    assert stage.remaining(5.0) is None
    board.step(51, {}, 60.0)  # resumed at 50; the first step's time has the start-up in it
    assert stage.remaining(60.0) is None
    board.step(52, {}, 62.0)
    assert stage.remaining(62.0) == 96.0
    assert stage.remaining(63.5) == 94.5
    for step in range(53, 93):
        board.step(step, {}, 62.0 + 4 * (step - 52))
    assert stage.remaining(222.0) == 8 * 4.0  # the slow early pace is forgotten
    assert stage.remaining(1000.0) == 0.0


def test_waiting_starting_and_stopped_stages() -> None:
    board = Board(("sft", "reward"))
    board.start("sft", 8, 0.0)
    assert draw(board, 80, 3.0).plain.splitlines() == [
        "▸ sft     ━━━━━━━━━━━━━━━━━━━━━━━━  0/8  0:03  starting",
        "",
        "· reward  waiting",
    ]
    board.step(2, {"sft/loss": 2.0}, 10.0)
    board.stop(12.0)
    assert draw(board, 80, 99.0).plain.splitlines() == [
        "✗ sft     stopped at 2/8 after 0:12  loss 2.00",
        "· reward  waiting",
    ]


def test_a_stage_that_goes_on_with_other_work_is_one_stage() -> None:
    clock, stream = FakeClock(), io.StringIO()
    progress = PlainProgress(["sft", "reward"], stream, clock)
    progress.stage("sft", 2)
    for step in (1, 2):
        clock.now += 10
        progress.step(step, {})
    progress.stage("sft", 4)
    for step in (3, 4):
        clock.now += 30
        progress.step(step, {"sft/loss": 1.5})
    progress.close()
    assert stream.getvalue().splitlines() == [
        "sft: 2 steps",
        "sft 1/2 | 0:10",
        "sft 2/2 | 0:20",
        "sft: 4 steps",
        "sft 3/4 | loss 1.50 | 0:50",
        "sft 4/4 | loss 1.50 | 1:20",
        "sft: done in 1:20 | loss 1.50",
    ]


def test_the_time_left_is_not_told_by_the_pace_of_other_work() -> None:
    board = Board(("sft",))
    board.start("sft", 2, 0.0)
    board.step(1, {}, 10.0)
    board.step(2, {}, 20.0)
    stage = board.start("sft", 5, 20.0)
    assert stage.is_running and not stage.is_complete
    assert stage.remaining(20.0) is None
    board.step(3, {}, 50.0)
    board.step(4, {}, 80.0)
    assert stage.remaining(80.0) == 30.0
    assert stage.elapsed(80.0) == 80.0


def test_the_latest_value_of_a_metric_stays_when_a_step_does_not_bring_it() -> None:
    board = Board(("reward",))
    board.start("reward", 9, 0.0)
    board.step(1, {"reward/loss": 0.7, "eval/accuracy": 0.71}, 1.0)
    stage = board.step(2, {"reward/loss": 0.6}, 2.0)
    assert stage.figures == ["loss 0.600", "held-out 71.0%"]


def test_an_unknown_stage_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="'rewards' is none of"):
        Board(("reward",)).start("rewards", 1, 0.0)


def test_plain_lines_are_the_first_the_last_and_few_between() -> None:
    stream, clock = io.StringIO(), FakeClock()
    progress = PlainProgress(("sft", "reward"), stream, clock)
    progress.stage("sft", 20)
    for step in range(1, 21):
        clock.now += 1
        progress.step(step, {"sft/loss": 2 - step / 20})
    progress.message("starting the \x1b[31mengines")
    progress.stage("reward", 5)
    clock.now += 3
    progress.step(1, {"reward/accuracy": 0.5})
    progress.close()
    assert stream.getvalue().splitlines() == [
        "sft: 20 steps",
        "sft 1/20 | loss 1.95 | 0:01",
        "sft 6/20 | loss 1.70 | 0:06 | left 0:14",
        "sft 11/20 | loss 1.45 | 0:11 | left 0:09",
        "sft 16/20 | loss 1.20 | 0:16 | left 0:04",
        "sft 20/20 | loss 1.00 | 0:20",
        "starting the \N{REPLACEMENT CHARACTER}[31mengines",
        "sft: done in 0:20 | loss 1.00",
        "reward: 5 steps",
        "reward 1/5 | accuracy 50.0% | 0:03",
        "reward: stopped at 1/5 after 0:03 | accuracy 50.0%",
    ]


def test_the_live_display_leaves_its_final_state_and_the_messages_above_it() -> None:
    clock = FakeClock()
    console = Console(file=io.StringIO(), width=60, height=20, force_terminal=True, color_system=None)
    progress = LiveProgress(("sft",), console, clock)
    progress.message("loading [bold]weights[/bold]")
    progress.stage("sft", 2)
    clock.now += 2
    progress.step(2, {"sft/loss": 0.5})
    progress.close()
    file = console.file
    assert isinstance(file, io.StringIO)
    assert "loading [bold]weights[/bold]\n" in file.getvalue()
    assert (
        "✓ sft  done in 0:02  loss 0.500"
        in file.getvalue().splitlines()[-2] + file.getvalue().splitlines()[-1]
    )


def test_what_opens_where() -> None:
    assert isinstance(open_progress(("sft",), io.StringIO()), PlainProgress)
    assert isinstance(open_progress(("sft",), io.StringIO(), quiet=True), QuietProgress)


def test_quiet_messages_go_to_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rlhf_ray"):
        QuietProgress().message("resumed at step 4")
    assert caplog.messages == ["resumed at step 4"]


def test_figures() -> None:
    stages = {"sft", "constitution", "preferences", "reward", "preference", "online"}
    assert set(KEY_FIGURES) == stages
    assert key_figures(
        "preferences", {"preferences/pairs": 512.0, "preferences/agreement": float("nan")}
    ) == [
        "pairs 512",
        "agreement -",
    ]
    assert key_figures("sft", {"stage": "sft", "sft/loss": None}) == []
    assert key_figures("preferences-2", {"preferences/pairs": 3.0}) == ["pairs 3"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.4126, "0.413"),
        (12.34, "12.3"),
        (1234.4, "1234"),
        (0.0, "0.00"),
        (-0.05, "-0.050"),
        (1.2e-7, "1.2e-07"),
        (3e6, "3.0e+06"),
        (float("nan"), "-"),
    ],
)
def test_compact(value: float, text: str) -> None:
    assert compact(value) == text


def test_duration_and_printable() -> None:
    assert [duration(s) for s in (0, 59.6, 187, 3787)] == ["0:00", "1:00", "3:07", "1:03:07"]
    assert printable("a\tb\r\n\x1b[2Jé✓") == "a   b\N{REPLACEMENT CHARACTER}\n\N{REPLACEMENT CHARACTER}[2Jé✓"
