"""A run that is stopped by Ctrl-C, then by a power cut, and taken up again equals one that was not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from rlhf_ray.reporting.files import read_lines
from rlhf_ray.reporting.run_folder import RunFolder
from tests.command_line import CommandLine, Finished
from tests.e2e.runs import assert_same_weights, contents, rollouts, untimed

pytestmark = [
    pytest.mark.actors,
    pytest.mark.slow,  # the default tests have tests/unit/test_resume_matrix.py
    pytest.mark.timeout(900),  # the first test waits for whole runs
]


@dataclass(frozen=True)
class Battered:
    """
    Fields:
        folder: of the run.
        interrupted: how it ended after Ctrl-C in step 0, and what `checkpoints/` held then.
        logged_at_the_cut: steps in `metrics.jsonl` when the power went, during its second life.
        resumed: how its third life ended.
    """

    folder: Path
    interrupted: Finished
    status: str
    saved: list[str]
    logged_at_the_cut: list[int]
    resumed: Finished


@pytest.fixture(scope="module")
def battered(rlhf_ray: CommandLine) -> Battered:
    folder = rlhf_ray.folder / "runs" / "battered"
    words = ("train", "online.yaml", "output_dir=runs/battered")

    def steps() -> list[int]:
        path = folder / "metrics.jsonl"
        return [int(str(row["step"])) for row in read_lines(path)] if path.exists() else []

    first = rlhf_ray.start(*words, REWARD_TAKES="2")
    # The file is opened when the loop begins; the first reward then takes its time.
    first.wait_until((folder / "metrics.jsonl").exists, timeout=200)
    first.press_ctrl_c()
    interrupted = first.wait(timeout=120)
    status = RunFolder(folder).read().status
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())

    second = rlhf_ray.start(*words, "--resume", REWARD_TAKES="1")
    # Steps 1 and 2 are done, and saved is what step 1 left: step 2 is lost and has to be done again.
    second.wait_until(lambda: steps()[-1:] == [2], timeout=200)
    second.kill()
    at_the_cut = steps()
    resumed = rlhf_ray.run(*words, "--resume")
    return Battered(folder, interrupted, status, saved, at_the_cut, resumed)


def test_ctrl_c_saves_and_says_how_to_go_on(battered: Battered) -> None:
    assert battered.interrupted.code == 130, battered.interrupted.err
    assert battered.interrupted.err == "rlhf-ray: online: stopped after step 1, saved; go on with --resume\n"
    assert "Ctrl-C: stopping after this step and saving" in battered.interrupted.out
    assert battered.status == "interrupted"
    assert battered.saved == ["step-000001"]


def test_the_power_cut_lost_a_step(battered: Battered) -> None:
    assert battered.logged_at_the_cut == [0, 1, 2]
    assert battered.resumed.code == 0, battered.resumed.err
    assert "online: resumed at step 2 of 5\n" in battered.resumed.out


def test_metrics_are_those_of_a_run_that_was_not_stopped(battered: Battered, online_run: Path) -> None:
    assert untimed(battered.folder) == untimed(online_run)


def test_samples_are_those_of_a_run_that_was_not_stopped(battered: Battered, online_run: Path) -> None:
    for step in range(5):
        assert rollouts(battered.folder, step) == rollouts(online_run, step)


def test_the_held_out_answers_are_those_of_a_run_that_was_not_stopped(
    battered: Battered, online_run: Path
) -> None:
    assert (battered.folder / "eval.jsonl").read_text() == (online_run / "eval.jsonl").read_text()


def test_weights_are_those_of_a_run_that_was_not_stopped(battered: Battered, online_run: Path) -> None:
    assert_same_weights(battered.folder, online_run)


def test_the_record_knows_of_the_resumptions(battered: Battered) -> None:
    record = RunFolder(battered.folder).read()
    assert (record.status, record.num_resumed) == ("done", 2)


def test_resuming_a_finished_run_does_nothing(rlhf_ray: CommandLine, online_run: Path) -> None:
    before = contents(online_run)
    again = rlhf_ray.run("train", "online.yaml", "--resume")
    assert again.code == 0, again.err
    assert "online: done before\n" in again.out
    after = contents(online_run)
    assert {name for name in after if after[name] != before.get(name)} <= {"logs/driver.log"}
    assert before.keys() == after.keys()
