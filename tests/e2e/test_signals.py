"""However a run is stopped: what it learned is saved, the exit code is 130, and no process is left."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf_ray.reporting.run_folder import RunFolder
from tests.command_line import CommandLine, Running
from tests.e2e.runs import EXACT, write_config

pytestmark = pytest.mark.actors

STEPS = 100_000
"""More than anybody waits for."""


@pytest.fixture(scope="module")
def config(workplace: Path) -> str:
    section = {"dataset": {"path": "embedded:demonstrations", "limit": 16}, "batch_size": 2, "max_length": 64}
    tree = {**EXACT, "output_dir": "runs/signals", "sft": {**section, "num_epochs": STEPS}}
    return write_config(workplace / "signals.yaml", tree).name


@contextmanager
def ignored(number: signal.Signals) -> Iterator[None]:
    """What is started here ignores the signal, as what a shell script puts in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


STOPS: dict[str, Callable[[Running], None]] = {
    "Ctrl-C": Running.press_ctrl_c,
    "Ctrl-C-of-kill": lambda running: running.send(signal.SIGINT),
    "SIGTERM": lambda running: running.send(signal.SIGTERM),
}


@pytest.mark.parametrize(
    "stop", ["Ctrl-C", pytest.param("Ctrl-C-of-kill", marks=pytest.mark.slow), "SIGTERM"]
)
def test_a_step_is_finished_and_saved(rlhf_ray: CommandLine, config: str, stop: str) -> None:
    folder = rlhf_ray.folder / "runs" / f"stopped-by-{stop}"
    with ignored(signal.SIGINT):
        running = rlhf_ray.start("train", config, f"output_dir={folder}")
    # The file is opened when the loop begins.
    running.wait_until((folder / "metrics.jsonl").exists, timeout=120)
    STOPS[stop](running)
    finished, left = running.wait_and_find_left(timeout=60)
    assert finished.code == 130, finished.err
    found = re.fullmatch(
        r"rlhf-ray: sft: stopped after step (\d+), saved; go on with --resume\n", finished.err
    )
    assert found is not None, finished.err
    assert f"{stop.split('-of-')[0]}: stopping after this step and saving" in finished.out
    saved = [path.name for path in (folder / "checkpoints").iterdir()]
    assert saved == [f"step-{int(found[1]):06d}"]
    assert RunFolder(folder).read().status == "interrupted"
    assert left == []


def has_handler(running: Running, folder: Path) -> bool:
    return running.handles(signal.SIGTERM)


def has_begun(running: Running, folder: Path) -> bool:
    """Ray is about to start, or starting."""
    return (folder / "logs" / "driver.log").exists()


def has_daemons(running: Running, folder: Path) -> bool:
    """Ray is starting: the first of its processes is there."""
    return any("gcs_server" in name for name in running.names())


@pytest.mark.parametrize(
    "moment",
    [has_handler, pytest.param(has_begun, marks=pytest.mark.slow), has_daemons],
)
def test_before_the_first_step_nothing_is_left(
    rlhf_ray: CommandLine, config: str, moment: Callable[[Running, Path], bool]
) -> None:
    folder = rlhf_ray.folder / "runs" / f"stopped-when-{moment.__name__}"
    running = rlhf_ray.start("train", config, f"output_dir={folder}")
    running.wait_until(lambda: moment(running, folder), timeout=60)
    running.send(signal.SIGTERM)
    finished, left = running.wait_and_find_left(timeout=60)
    assert finished.code == 130, finished.err
    # Native code whose import is interrupted may have complained before.
    assert finished.err.endswith(
        (
            "rlhf-ray: interrupted\n",
            "rlhf-ray: sft: stopped before it began; go on with --resume\n",
            "rlhf-ray: sft: stopped before its first step; go on with --resume\n",
        )
    )
    assert left == []
