"""`rlhf-ray check` on thousands of bad configurations and datasets: exit code 0 or 2, in words of ours, soon.

A few hundred, always the same, in the default run; thousands, always others, with

    python -m pytest -m slow tests/unit/test_fuzz_check.py
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from launch.cli import main
from rlhf_ray.data import reasoning_gym
from tests.fuzzing import Case, bomb, datasets, make_place, prepared, texts, trees

PATIENCE = 20.0
"""Seconds. Most are judged in milliseconds; the first also waits for imports."""
FOREIGN = ("pydantic", "Value error", "Input should", "Field required", "Traceback")

FEW = settings(
    max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=[*HealthCheck]
)
MANY = settings(max_examples=3000, deadline=None, suppress_health_check=[*HealthCheck])


class Late(BaseException):
    """Not answered in time."""


@contextmanager
def in_time(seconds: float = PATIENCE) -> Iterator[None]:
    def late(*_: object) -> None:
        raise Late

    before, began = signal.signal(signal.SIGALRM, late), time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # the clock of the whole test goes on
            signal.setitimer(signal.ITIMER_REAL, max(0.01, left - (time.monotonic() - began)))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_place(tmp_path)


def judge(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said to a person; nothing of it is Python's or a library's."""
    capsys.readouterr()
    with in_time():
        code = main(words)
    out, err = capsys.readouterr()
    assert code in (0, 2), err
    assert not any(word in err for word in FOREIGN), err
    if code == 0:
        assert out.startswith("OK: ") and err == ""
    else:
        assert err.startswith("rlhf-ray: ") and out == ""
    return err


@FEW
@given(case=trees())
def test_changed_configurations(capsys: pytest.CaptureFixture[str], case: Case) -> None:
    judge(capsys, *prepared(case))


@FEW
@given(case=texts())
def test_damaged_files(capsys: pytest.CaptureFixture[str], case: Case) -> None:
    judge(capsys, *prepared(case))


@FEW
@given(case=datasets())
def test_bad_datasets(capsys: pytest.CaptureFixture[str], case: Case) -> None:
    judge(capsys, *prepared(case))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@MANY
@given(case=trees() | texts() | datasets())
def test_thousands(capsys: pytest.CaptureFixture[str], case: Case) -> None:
    judge(capsys, *prepared(case))


def test_aliases_that_stand_for_millions(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bomb.yaml").write_text(bomb(30))
    err = judge(capsys, "check", "bomb.yaml")
    assert err == "rlhf-ray: bomb.yaml: not valid YAML: its aliases stand for more than 100,000 values\n"


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/urandom", ".", "nowhere.yaml", "", "\0", "x" * 5000])
def test_what_is_no_file(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert judge(capsys, "check", name) != ""


def test_a_pipe_is_no_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody writes into it, and whoever opens it waits for ever."""
    os.mkfifo("pipe.jsonl")
    words = ["output_dir=r", "model.path=tiny", "sft.dataset.path=pipe.jsonl"]
    Path("none.yaml").write_text("")
    assert "pipe.jsonl: is no ordinary file" in judge(capsys, "check", "none.yaml", *words)


def test_a_module_that_ends_the_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("quitting.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(Path.cwd())
    words = ["model.path=tiny", "online.rewards=[{type: function, name: f, function: 'quitting:f'}]"]
    err = judge(capsys, "check", "grpo-arithmetic", *words)
    assert "online.rewards.0.function=quitting:f: importing it raised SystemExit: 0" in err


def test_a_question_that_takes_for_ever(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number of ten million digits: Python multiplies, and hears no signal meanwhile."""
    monkeypatch.setattr(reasoning_gym, "PATIENCE", 2.0)
    options = "online.dataset.options={min_digits: 10000000, max_digits: 10000000}"
    err = judge(capsys, "check", "grpo-arithmetic", "model.path=tiny", options)
    assert "online.dataset.options" in err and "takes more than 2 s for a question" in err


def test_questions_without_end_are_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    judge(capsys, "check", "grpo-arithmetic", "model.path=tiny", f"online.dataset.limit={10**12}")
