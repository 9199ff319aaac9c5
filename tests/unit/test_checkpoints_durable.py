"""Checkpoints on a disk that fills up or loses power, the best of them, and the deadline of a run."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from threading import Event

import pytest

from launch.interrupts import stopping_by_itself
from rlhf_ray.config.checks import load_checked
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.schema import KeepBestSection, ModelSection, TrainingSection, seconds_left
from rlhf_ray.errors import ConfigError, DiskFullError, Interrupted, WorkerError
from rlhf_ray.loops import checkpoints as module
from rlhf_ray.loops.checkpoints import BEST_MODEL, STATE_FILE, Checkpoints, restored_step
from rlhf_ray.reporting import files
from rlhf_ray.types import Metrics
from rlhf_ray.workers.policy import PolicyWorker
from tests.fakes import PowerCut
from tests.local_roles import LocalPolicy, stage_run
from tests.ranks import worker_spec
from tests.tiny import tiny_model_folder
from tests.unit.test_loops_checkpoints import Notebook, names

GB = 10**9


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> LocalPolicy:
    """A real one, whose state is a little more than a megabyte."""
    model = ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))
    return LocalPolicy(PolicyWorker(model, worker_spec(TrainingSection(precision="float32"))))


def saved_step(checkpoints: Checkpoints) -> int | None:
    found = checkpoints.latest()
    return None if found is None else restored_step(found[1])


# On the disk


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder, then the rename, then the folder around it."""
    done: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(files.os, "fsync", lambda fd: done.append(os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append(f"-> {to.name}"), rename(path, to))[1])
    Checkpoints(tmp_path, 1, 1).save(3, {"policy": Notebook("p")}, {})
    aside = tmp_path / ".step-000003.incomplete"
    before = done[: done.index("-> step-000003")]
    assert set(before) == {str(aside / name) for name in ("policy/text", "policy", STATE_FILE)} | {str(aside)}
    assert done[len(before) :] == ["-> step-000003", str(tmp_path)]


CALLS: dict[str, tuple[object, Callable[..., object]]] = {
    "fsync": (os, os.fsync),
    "mkdir": (Path, Path.mkdir),
    "rename": (Path, Path.rename),
    "rmtree": (shutil, shutil.rmtree),
}


def cut_after(place: int, call: Callable[..., object], counts: list[int]) -> Callable[..., object]:
    """The call, until it was made so many times. counts: of which the last is that of the calls."""

    def cut(*arguments: object, **options: object) -> object:
        counts[-1] += 1
        if counts[-1] > place:
            raise PowerCut
        return call(*arguments, **options)

    return cut


@pytest.mark.parametrize("moment", CALLS)
def test_power_may_go_at_any_moment_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """At every call of the file system in turn: one of the two checkpoints is whole, and nothing else
    remains after the next start."""
    counts: list[int] = []
    for place in range(30):
        folder = tmp_path / str(place)
        checkpoints = Checkpoints(folder, 1, 1)
        checkpoints.save(1, {"model": Notebook("one")}, {})
        counts.append(0)
        with monkeypatch.context() as patched:
            owner, original = CALLS[moment]
            patched.setattr(owner, moment, cut_after(place, original, counts))
            with suppress(PowerCut):
                checkpoints.save(2, {"model": Notebook("two")}, {})
        step = saved_step(checkpoints)
        assert step in (1, 2)
        text = (folder / f"step-00000{step}" / "model" / "text").read_text()
        assert text == {1: "one", 2: "two"}[step]
        whole = [path for path in names(folder) if path.startswith("step-")]
        assert names(folder) == whole and whole[-1] == f"step-00000{step}"
        for path in whole:
            assert (folder / path / "model" / "text").exists()
        if counts[-1] <= place:
            break
    assert counts[-1] == len(counts) - 1 > 0, "every call was cut off once, and then none"


# A full disk


def assert_full(error: DiskFullError, folder: Path, *said: str) -> None:
    for words in (str(folder), "make room", "--resume", *said):
        assert words in str(error)


def test_what_will_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, 1, 2)
    checkpoints.save(1, {"model": Notebook("x" * 5000)}, {})
    monkeypatch.setattr(module, "free_space", lambda folder: 4321)
    with pytest.raises(DiskFullError) as raised:
        checkpoints.save(2, {"model": Notebook("y", fails=AssertionError("begun"))}, {})
    assert_full(
        raised.value, tmp_path, "step 2 needs about 5.01 kB", "4.32 kB are free", "step-000001 is whole"
    )
    assert names(tmp_path) == ["step-000001"]


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        DiskFullError("step-000002/model: the disk, or a quota on it, is full"),
    ],
)
def test_a_disk_that_fills_while_saving(tmp_path: Path, failure: Exception) -> None:
    checkpoints = Checkpoints(tmp_path, 1, 1)
    with pytest.raises(DiskFullError) as raised:
        checkpoints.save(1, {"model": Notebook("one", fails=failure)}, {})
    assert_full(raised.value, tmp_path, "There is none before it", "needs more than 3 bytes")
    checkpoints.save(1, {"model": Notebook("one")}, {})
    with pytest.raises(DiskFullError, match="step-000001 is whole"):
        checkpoints.save(2, {"model": Notebook("two", fails=failure)}, {})
    assert names(tmp_path) == ["step-000001"]
    assert saved_step(checkpoints) == 1


def test_other_failures_are_what_they_are(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 1, 1)
    with pytest.raises(WorkerError, match="rank 1 died"):
        checkpoints.save(1, {"model": Notebook("one", fails=WorkerError("rank 1 died"))}, {})
    assert names(tmp_path) == []


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files of this process may grow no larger; as with a quota, the file system says that it has room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_quota(tmp_path: Path, policy: LocalPolicy) -> None:
    """DeepSpeed's own writing, cut short: torch then complains of an unexpected position."""
    checkpoints = Checkpoints(tmp_path, 1, 1)
    checkpoints.save(1, {"policy": policy}, {})
    with largest_file(100_000), pytest.raises(DiskFullError) as raised:
        checkpoints.save(2, {"policy": policy}, {})
    assert_full(raised.value, tmp_path, "step-000001 is whole")
    assert names(tmp_path) == ["step-000001"]
    checkpoints.save(3, {"policy": policy}, {})
    assert names(tmp_path) == ["step-000003"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no disk may be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    # Lazily: the traceback of a failure keeps the file open that could not be written.
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, policy: LocalPolicy) -> None:
    folder = small_disk / "checkpoints"
    checkpoints = Checkpoints(folder, 1, 1)
    checkpoints.save(1, {"policy": policy}, {})
    # The second would fit by the size of the first, and something else takes the room meanwhile.
    size = files.size_of(folder)
    hog = small_disk / "hog"

    def take_room(folder: Path) -> LocalPolicy:
        hog.write_bytes(b"x" * (files.free_space(small_disk) - size // 2))
        return policy

    class Late(LocalPolicy):
        def save_state(self, folder: Path):  # type: ignore[no-untyped-def]
            return take_room(folder).save_state(folder)

    with pytest.raises(DiskFullError) as raised:
        checkpoints.save(2, {"policy": Late(policy.worker)}, {})
    assert_full(raised.value, folder, f"needs about {files.shown_size(size)}", "step-000001 is whole")
    assert names(folder) == ["step-000001"]
    with pytest.raises(DiskFullError, match="the disk is full"):
        checkpoints.save(2, {"policy": policy}, {})
    checkpoints.load_models(folder / "step-000001", {"policy": policy})
    hog.unlink()
    checkpoints.save(2, {"policy": policy}, {})
    assert names(folder) == ["step-000002"]


def test_the_model_of_a_stage_on_a_full_disk(tmp_path: Path, policy: LocalPolicy) -> None:
    with largest_file(50_000), pytest.raises(DiskFullError, match=f"{tmp_path / 'model'}: the disk"):
        policy.save_model(tmp_path / "model")


# The best

BEST = KeepBestSection(metric="eval/reward/proxy")


def judged(value: float | None) -> Metrics:
    return {"loss": 1.0} if value is None else {"eval/reward/proxy": value}


@pytest.mark.parametrize(
    ("mode", "values", "kept"),
    [
        ("max", [0.1, 0.5, None, 0.4, 0.2], [2, 5]),
        ("min", [0.1, 0.5, None, 0.4, 0.2], [1, 5]),
        ("max", [0.5, 0.5, 0.5, None, None], [1, 5]),
        ("max", [None, float("nan"), None, None, float("nan")], [5]),
        ("max", [0.1, 0.2, 0.3, 0.4, 0.5], [5]),
    ],
)
def test_the_best_is_kept_beside_the_last(
    tmp_path: Path, mode: str, values: list[float | None], kept: list[int]
) -> None:
    checkpoints = Checkpoints(tmp_path, 1, 1, KeepBestSection(metric="eval/reward/proxy", mode=mode))
    for step, value in enumerate(values, start=1):
        checkpoints.save(step, {"model": Notebook(str(step))}, {}, judged(value))
    assert names(tmp_path) == [f"step-{step:06d}" for step in kept]
    assert saved_step(checkpoints) == 5, "resumed is always from the last"


def test_a_new_best_is_saved_whenever_it_comes(tmp_path: Path) -> None:
    run = stage_run(tmp_path, every=4)
    run.checkpoints = Checkpoints(tmp_path / "checkpoints", 4, 1, BEST)
    run.begin(0, 8)
    values = [None, 0.3, None, 0.2, None, 0.4, None, 0.1]
    seen = []
    for step, value in enumerate(values):
        run.log(step, judged(value))
        run.save_or_stop(step + 1, {"model": Notebook(f"after {step + 1}"), "critic": Notebook("c")}, dict)
        folder = tmp_path / "checkpoints"
        seen.append(sorted(int(n[-6:]) for n in names(folder)) if folder.exists() else [])
    run.close()
    assert seen == [[], [2], [2], [2, 4], [2, 4], [6], [6], [6, 8]]
    said = run.checkpoints.take_best_model(tmp_path / "best")
    assert said == "step 6, eval/reward/proxy 0.4"
    assert (tmp_path / "best" / "for-others").read_text() == "after 6"
    assert (tmp_path / "best" / "best.json").read_text() == '{"step": 6, "eval/reward/proxy": 0.4}\n'
    assert run.checkpoints.take_best_model(tmp_path / "best") is None, "once"


def test_only_the_best_carries_a_model_for_other_tools(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 1, 9, BEST)
    for step, value in enumerate([0.2, 0.1, 0.3], start=1):
        checkpoints.save(step, {"model": Notebook()}, {}, judged(value))
    have = [path.parent.name for path in sorted(tmp_path.glob(f"step-*/{BEST_MODEL}"))]
    assert have == ["step-000001", "step-000003"]


def test_another_metric_begins_anew(tmp_path: Path) -> None:
    Checkpoints(tmp_path, 1, 1, BEST).save(1, {"model": Notebook()}, {}, judged(0.9))
    other = Checkpoints(tmp_path, 1, 1, KeepBestSection(metric="loss", mode="min"))
    assert other.is_due(2, {"loss": 5.0})


# The deadline


@pytest.mark.parametrize(
    ("deadline", "seconds"),
    [("45s", 45), ("90m", 5400), ("3h50m", 13800), ("1d2h", 93600), ("2030-01-31T18:30", 1800)],
)
def test_durations_and_times(deadline: str, seconds: float) -> None:
    assert seconds_left(deadline, datetime(2030, 1, 31, 18, 0)) == seconds


MINIMAL = {"output_dir": "r", "sft": {"dataset": {"path": "embedded:demonstrations"}}}


@pytest.mark.parametrize("deadline", ["soon", "", "3 h", "50m3h", "-5m", "18:30", "²h", "2030-13-01", "1.5h"])
def test_what_is_no_deadline(deadline: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.deadline.*must be a duration such as 3h50m"):
        load_config({**MINIMAL, "checkpoint": {"deadline": deadline}})


@pytest.mark.parametrize("deadline", ["0s", (datetime.now() - timedelta(hours=1)).isoformat()], ids=[0, 1])
def test_a_deadline_that_has_passed(deadline: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.deadline=.*: has passed"):
        load_checked({**MINIMAL, "checkpoint": {"deadline": deadline}})


def test_a_metric_that_nothing_measures() -> None:
    with pytest.raises(
        ConfigError, match=r"keep_best\.metric=eval/loss: nothing is evaluated .* sft\.eval_every"
    ):
        load_checked({**MINIMAL, "checkpoint": {"keep_best": {"metric": "eval/loss", "mode": "min"}}})


def test_a_reward_that_is_not_there() -> None:
    best = {"metric": "eval/reward/proxi"}
    with pytest.raises(ConfigError, match=r"has no reward proxi; did you mean eval/reward/proxy\?"):
        load_checked("configs/quickstart.yaml", ["online.eval_every=2", f"checkpoint.keep_best={best}"])


def test_the_deadline_stops_as_ctrl_c_does(tmp_path: Path) -> None:
    event, said = Event(), []
    run = stage_run(tmp_path, interrupt=event)
    with stopping_by_itself(0.05, event, said.append):
        assert event.wait(10)
    assert said == ["deadline: stopping after this step and saving"]
    with pytest.raises(Interrupted, match="stopped after step 1, saved; go on with --resume"):
        run.save_or_stop(1, {"model": Notebook("state")}, dict)
    assert saved_step(run.checkpoints) == 1


def test_a_run_that_is_done_in_time_is_left_alone() -> None:
    event = Event()
    with stopping_by_itself(0.1, event, print):
        pass
    assert not event.wait(0.3)
    with stopping_by_itself(float("inf"), event, print):
        assert not event.is_set()
