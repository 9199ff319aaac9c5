"""How often losses are made up for, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.recovery import Recoveries
from rlhf_ray.errors import RewardError, RlhfRayError, WorkerLost
from rlhf_ray.reporting.files import read_lines

DEATH = WorkerLost("engine.generate failed: its process died")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def recoveries(tmp_path: Path, said: list[str]) -> Recoveries:
    return Recoveries(tmp_path / "recoveries.jsonl", limit=2, say=said.append)


def test_a_loss_and_a_return_are_told_counted_and_kept(recoveries: Recoveries, said: list[str]) -> None:
    assert recoveries.step_done(0) == {}, "a run that loses nothing logs nothing"
    recoveries.lost("engine[0]", DEATH)
    recoveries.lost("reward", WorkerLost("reward: no sign of life for 60 s"))
    recoveries.returned("engine[0]")
    recoveries.returned("reward")
    assert said[:2] == [
        f"{DEATH}; engine[0] starts again",
        "reward: no sign of life for 60 s; reward starts again",
    ]
    assert said[2].startswith("engine[0]: back after 0.")
    metrics = recoveries.step_done(1)
    assert metrics["recovery/count"] == 2.0
    assert 0.0 <= metrics["recovery/seconds"] < 1.0
    assert recoveries.step_done(2) == {}
    lines = read_lines(recoveries.path)
    assert [(line["event"], line["name"]) for line in lines] == [
        ("lost", "engine[0]"),
        ("lost", "reward"),
        ("returned", "engine[0]"),
        ("returned", "reward"),
    ]
    assert lines[0]["cause"] == str(DEATH)
    assert "seconds" in lines[2]


def test_each_may_be_lost_so_often_in_a_row(recoveries: Recoveries, said: list[str]) -> None:
    for _ in range(2):
        recoveries.lost("engine[0]", DEATH)
        recoveries.lost("engine[1]", DEATH)
    assert said[-1].endswith("engine[1] starts again (2 of 2 in a row)")
    with pytest.raises(WorkerLost) as caught:
        recoveries.lost("engine[0]", DEATH)
    assert caught.value is DEATH


def test_only_a_step_that_was_not_done_before_is_progress(recoveries: Recoveries) -> None:
    recoveries.step_done(4)
    recoveries.lost("engine", DEATH)
    recoveries.lost("engine", DEATH)
    # From a checkpoint, the same steps once more, up to the one that kills.
    for step in (3, 4):
        recoveries.step_done(step)
    with pytest.raises(WorkerLost):
        recoveries.lost("engine", DEATH)
    recoveries.step_done(5)
    recoveries.lost("engine", DEATH)


def stage_that(*outcomes: RlhfRayError | str) -> Callable[[], str]:
    """Does what is said, one at a time."""
    left = list(outcomes)

    def stage() -> str:
        outcome = left.pop(0)
        if isinstance(outcome, RlhfRayError):
            raise outcome
        return outcome

    return stage


def test_a_stage_that_loses_its_roles_runs_again(recoveries: Recoveries) -> None:
    assert recoveries.run(stage_that(DEATH, DEATH, "done")) == "done"
    recoveries.begun()
    events = [(line["event"], line["name"]) for line in read_lines(recoveries.path)]
    assert events == [("lost", "all roles"), ("lost", "all roles"), ("returned", "all roles")]
    with pytest.raises(WorkerLost):
        recoveries.run(stage_that(DEATH, "never"))


def test_a_stage_whose_work_fails_does_not(recoveries: Recoveries) -> None:
    with pytest.raises(RewardError):
        recoveries.run(stage_that(RewardError("reward 'x' raised ValueError"), "never"))
    assert not recoveries.path.exists()


def test_a_disk_that_is_full_is_no_second_loss(tmp_path: Path, said: list[str]) -> None:
    recoveries = Recoveries(tmp_path / "no-such-folder" / "recoveries.jsonl", limit=1, say=said.append)
    recoveries.lost("engine", DEATH)
    assert len(said) == 1
