"""The run's folder: who may take it, what run.json says, and that it is never half written."""

from __future__ import annotations

import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_ray.errors import ConfigError, DataError, Interrupted
from rlhf_ray.reporting.files import dump_line, read_lines, written_aside
from rlhf_ray.reporting.run_folder import RunFolder, RunRecord


def test_run_json_says_what_was_run_and_how_it_ended(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out" / "run")
    record = RunRecord("sft", {"seed": 3}, data={"d.jsonl": "ab12"}, parents={"model": "base"})
    folder.begin(record, resume=False)
    content = json.loads(folder.run_path.read_text())
    assert content["status"] == "running" and content["ended"] is None
    assert content["config"] == {"seed": 3}
    assert content["data"] == {"d.jsonl": "ab12"} and content["parents"] == {"model": "base"}
    assert content["versions"]["python"] == platform.python_version()
    assert content["versions"]["torch"] == torch.__version__

    folder.finish("done", {"sft/loss": 1.5, "sft/bad": float("nan")})
    content = json.loads(folder.run_path.read_text())
    assert content["status"] == "done" and content["ended"] >= content["started"]
    assert content["metrics"] == {"sft/loss": 1.5, "sft/bad": None}
    assert folder.read().metrics["sft/bad"] != folder.read().metrics["sft/bad"]  # NaN again


def test_folders_are_made_when_they_are_needed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert not folder.path.exists()
    folder.begin(RunRecord("sft", {}), resume=False)
    assert [path.name for path in folder.path.iterdir()] == ["run.json"]
    assert folder.checkpoints.is_dir() and folder.stage("sft").rollouts == folder.path / "sft" / "rollouts"
    assert (folder.path / "sft" / "rollouts").is_dir()


def test_another_run_is_refused_with_the_remedy(tmp_path: Path) -> None:
    RunFolder(tmp_path).begin(RunRecord("sft", {}), resume=False)
    with pytest.raises(ConfigError) as caught:
        RunFolder(tmp_path).begin(RunRecord("sft", {}), resume=False)
    remedy = "continue it with resume=auto, or choose another output_dir"
    assert str(caught.value) == f"output_dir={tmp_path}: holds another run; {remedy}"


def test_files_that_a_run_would_overwrite_are_refused_and_others_are_not(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=r"holds model, which a run would overwrite, and no run\.json"):
        RunFolder(tmp_path).begin(RunRecord("sft", {}), resume=True)
    (tmp_path / "model").rmdir()
    (tmp_path / "reward").mkdir()
    with pytest.raises(ConfigError, match="holds reward"):
        RunFolder(tmp_path).begin(RunRecord("pipeline", {}, ("sft", "reward")), resume=False)
    RunFolder(tmp_path).begin(RunRecord("sft", {}), resume=False)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resuming_keeps_the_start_and_adds_up_the_time(tmp_path: Path) -> None:
    began = time.monotonic()
    first = RunFolder(tmp_path)
    started = first.begin(RunRecord("sft", {"seed": 1}), resume=True).started
    time.sleep(0.15)
    first.record_summary({"prompts": 4})
    first.finish("interrupted")
    again = RunFolder(tmp_path)
    record = again.begin(RunRecord("sft", {"seed": 2}), resume=True)
    assert record.started == started and record.status == "running" and record.num_resumed == 1
    assert record.config == {"seed": 2} and record.summary == {"prompts": 4} and record.ended is None
    time.sleep(0.15)
    # Two times of at least 0.15 s, each rounded to a tenth; a busy machine sleeps longer.
    assert 0.2 <= again.finish("done").seconds <= time.monotonic() - began + 0.1


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (Interrupted("saved"), "interrupted", None),
        (KeyboardInterrupt(), "interrupted", None),
        (ValueError("boom"), "failed", "ValueError: boom"),
    ],
)
def test_the_outcome_of_a_block_is_recorded(
    tmp_path: Path, error: BaseException, status: str, message: str | None
) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(RunRecord("sft", {}), resume=False)
    with pytest.raises(type(error)), folder.recording_outcome():
        raise error
    assert (folder.read().status, folder.read().error) == (status, message)


def test_a_block_that_ends_well_is_done_and_keeps_what_finish_said(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(RunRecord("sft", {}), resume=False)
    with folder.recording_outcome():
        folder.finish("done", {"a": 1.0})
    assert folder.read().status == "done" and folder.read().metrics == {"a": 1.0}


def test_no_run_and_a_damaged_run_are_the_users_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not a run: it has no run\.json; give the output_dir of a run"):
        RunFolder(tmp_path / "nowhere").read()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="not a run"):
        RunFolder(tmp_path / "file").read()
    for content in ('{"name": "s', "[]", '{"unknown": 1}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(DataError, match=r"run\.json: damaged"):
            RunFolder(tmp_path).read()


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), written_aside(target) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with written_aside(target) as aside:
        aside.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_json_has_only_what_every_parser_accepts() -> None:
    value = {
        "a": np.float32(0.5),
        "b": np.int64(3),
        "c": np.bool_(True),
        "d": (math.inf, np.nan),
        5: Path("x/y"),
    }
    assert dump_line(value) == '{"a": 0.5, "b": 3, "c": true, "d": [null, null], "5": "x/y"}\n'
    with pytest.raises(TypeError, match="set has no place in JSON"):
        dump_line({"a": {1}})


def test_jsonl_forgives_a_torn_last_line_only(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read_lines(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: not JSON"):
        read_lines(path)


def test_a_run_that_failed_before_its_first_step_may_be_tried_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(RunRecord(name="sft", config={}), resume=False)
    folder.finish("failed", error="DataError: no such file")
    assert not folder.holds_run()
    assert folder.begin(RunRecord(name="sft", config={}), resume=False).status == "running"
    folder.metrics_path.write_text('{"step": 0}\n')
    folder.finish("failed", error="WorkerError: out of memory")
    assert folder.holds_run()
    with pytest.raises(ConfigError, match="holds another run"):
        folder.begin(RunRecord(name="sft", config={}), resume=False)
