"""Whole or absent, the newest kept; and what a stage writes around its steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Event

import pytest

from rlhf_ray.data.cursor import Cursor
from rlhf_ray.errors import CheckpointError, Interrupted
from rlhf_ray.loops.checkpoints import STATE_FILE, Checkpoints, restored_cursor, restored_step
from rlhf_ray.roles import Done, Pending
from tests.fakes import PowerCut
from tests.local_roles import logged, stage_run


@dataclass
class Notebook:
    """A `Trained` whose whole state is a text; saving may fail halfway."""

    text: str = ""
    fails: BaseException | None = None

    def save_model(self, folder: Path) -> Pending[None]:
        folder.mkdir()
        (folder / "for-others").write_text(self.text)
        return Done(None)

    def save_state(self, folder: Path) -> Pending[None]:
        folder.mkdir()
        (folder / "text").write_text(self.text)
        if self.fails is not None:
            raise self.fails
        return Done(None)

    def load_state(self, folder: Path) -> Pending[None]:
        self.text = (folder / "text").read_text()
        return Done(None)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=2, keep_last=1)
    assert checkpoints.latest() is None
    assert [checkpoints.is_due(step) for step in range(1, 5)] == [False, True, False, True]
    checkpoints.save(2, {"policy": Notebook("p"), "critic": Notebook("c")}, {"kl": {"coef": 0.5}})
    found = checkpoints.latest()
    assert found is not None
    folder, state = found
    assert state == {"step": 2, "kl": {"coef": 0.5}}
    assert restored_step(state) == 2
    policy, critic = Notebook(), Notebook()
    checkpoints.load_models(folder, {"policy": policy, "critic": critic})
    assert (policy.text, critic.text) == ("p", "c")


def test_nothing_is_due_without_an_interval(tmp_path: Path) -> None:
    assert not any(Checkpoints(tmp_path, every=None, keep_last=1).is_due(step) for step in range(100))


@pytest.mark.parametrize("keep_last", [1, 2])
def test_the_newest_are_kept(tmp_path: Path, keep_last: int) -> None:
    checkpoints = Checkpoints(tmp_path, every=1, keep_last=keep_last)
    for step in (9, 10, 100, 101):
        checkpoints.save(step, {}, {})
    assert names(tmp_path) == [f"step-{step:06d}" for step in (9, 10, 100, 101)][-keep_last:]
    found = checkpoints.latest()
    assert found is not None
    assert restored_step(found[1]) == 101


def test_a_save_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every=1, keep_last=1)
    checkpoints.save(1, {"model": Notebook("one")}, {})
    with pytest.raises(PowerCut):
        checkpoints.save(2, {"model": Notebook("two", fails=PowerCut())}, {})
    assert names(tmp_path) == [".step-000002.incomplete", "step-000001"]
    found = checkpoints.latest()
    assert found is not None
    assert restored_step(found[1]) == 1
    assert names(tmp_path) == ["step-000001"], "the next start has removed what was left"
    checkpoints.save(2, {"model": Notebook("again")}, {})
    assert names(tmp_path) == ["step-000002"]
    assert (tmp_path / "step-000002" / "model" / "text").read_text() == "again"


def test_saving_the_same_step_again_keeps_the_first(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every=1, keep_last=1)
    checkpoints.save(1, {"model": Notebook("first")}, {})
    checkpoints.save(1, {"model": Notebook("second")}, {})
    assert (tmp_path / "step-000001" / "model" / "text").read_text() == "first"


@pytest.mark.parametrize("content", [None, "{", ""])
def test_damage_is_named(tmp_path: Path, content: str | None) -> None:
    checkpoints = Checkpoints(tmp_path, every=1, keep_last=1)
    checkpoints.save(3, {}, {})
    path = tmp_path / "step-000003" / STATE_FILE
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CheckpointError, match=r"step-000003.*remove this folder"):
        checkpoints.latest()


def test_clear_leaves_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1, keep_last=2)
    checkpoints.clear()
    checkpoints.save(1, {}, {})
    checkpoints.clear()
    assert checkpoints.latest() is None


def test_a_cursor_of_another_dataset_is_refused() -> None:
    cursor = Cursor(12, seed=0)
    cursor.next(5)
    state: dict[str, object] = {"step": 1, "cursor": dict(cursor.state())}
    assert restored_cursor(state, 12).next(3).tolist() == cursor.next(3).tolist()
    with pytest.raises(CheckpointError, match="dataset of 12 usable rows, and now there are 13"):
        restored_cursor(state, 13)


def test_an_interrupted_stage_saves_first(tmp_path: Path) -> None:
    interrupt = Event()
    run = stage_run(tmp_path, every=None, interrupt=interrupt)
    model = Notebook("state")
    run.save_or_stop(1, {"model": model}, dict)
    assert run.checkpoints.latest() is None
    interrupt.set()
    with pytest.raises(Interrupted, match="stage: stopped after step 2, saved; go on with --resume"):
        run.save_or_stop(2, {"model": model}, dict)
    found = run.checkpoints.latest()
    assert found is not None
    assert restored_step(found[1]) == 2


def test_metrics_of_a_step_and_its_speed(tmp_path: Path) -> None:
    run = stage_run(tmp_path)
    run.timings = lambda: {"time/busy": 0.0, "time/score": 0.0}
    run.begin(0, 2)
    run.log(0, {"loss": 1.5, "perf/trained_tokens": 100.0})
    last = run.last_metrics
    assert last["time/overhead"] == 1.0
    assert "time/busy" not in last
    assert last["perf/tokens_per_second"] == pytest.approx(100 / last["time/step"])
    run.close()
    assert logged(tmp_path) == [{"step": 0, "stage": "stage", "loss": 1.5, "perf/trained_tokens": 100.0}]


def test_a_stage_resumed_at_its_end_still_knows_its_last_metrics(tmp_path: Path) -> None:
    run = stage_run(tmp_path)
    run.begin(0, 1)
    run.log(0, {"loss": 1.5})
    run.close()
    resumed = stage_run(tmp_path)
    resumed.begin(1, 1)
    resumed.close()
    assert resumed.last_metrics["loss"] == 1.5
