"""metrics.jsonl, its resumption, and the trackers, read back with the trackers' own readers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_ray.config.schema import LoggingSection
from rlhf_ray.errors import DataError
from rlhf_ray.reporting.metrics_log import MetricsLog, load_run, read_metrics
from rlhf_ray.reporting.run_folder import RunFolder, RunRecord

NOTHING_ELSE = LoggingSection()


def test_a_line_a_step_on_disk_at_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with MetricsLog(folder, "online", NOTHING_ELSE, config={}) as log:
        log.log(0, {"reward/mean": 0.5, "kl/mean": float("nan"), "x": float("inf")})
        line = folder.metrics_path.read_text()
        log.log(1, {"reward/mean": 1})
    row = json.loads(line)
    assert list(row) == ["step", "stage", "time", "reward/mean", "kl/mean", "x"]
    assert (row["step"], row["stage"], row["reward/mean"], row["kl/mean"], row["x"]) == (
        0,
        "online",
        0.5,
        None,
        None,
    )
    assert row["time"] == pytest.approx(time.time(), abs=60)
    rows = read_metrics(folder.metrics_path)
    assert [row["step"] for row in rows] == [0, 1]
    assert isinstance(rows[0]["kl/mean"], float) and math.isnan(rows[0]["kl/mean"])


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def without_time(folder: RunFolder) -> list[dict[str, object]]:
        return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(folder.metrics_path)]

    whole, resumed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "resumed")
    with MetricsLog(whole, "sft", NOTHING_ELSE, config={}) as log:
        for step in range(8):
            log.log(step, {"loss": step / 7})
    with MetricsLog(resumed, "sft", NOTHING_ELSE, config={}) as log:
        for step in range(6):
            log.log(step, {"loss": step / 7})
    with resumed.metrics_path.open("a") as file:
        file.write('{"step": 6, "stage": "sf')  # killed while it wrote
    with MetricsLog(resumed, "sft", NOTHING_ELSE, config={}, resume_step=4) as log:
        assert [row["step"] for row in read_metrics(resumed.metrics_path)] == [0, 1, 2, 3]
        for step in range(4, 8):
            log.log(step, {"loss": step / 7})
    assert without_time(resumed) == without_time(whole)


def test_a_step_is_logged_once(tmp_path: Path) -> None:
    with MetricsLog(RunFolder(tmp_path), "sft", NOTHING_ELSE, config={}, resume_step=3) as log:
        with pytest.raises(ValueError, match="step 2 was logged already; the last one was 2"):
            log.log(2, {})
        log.log(3, {})
        with pytest.raises(ValueError, match="step 3"):
            log.log(3, {})


def test_tensorboard_holds_the_steps_of_the_resumed_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, section = RunFolder(tmp_path), LoggingSection(tensorboard=True)
    with MetricsLog(folder, "sft", section, config={}) as log:
        for step in range(4):
            log.log(step, {"loss": float(step)})
    with MetricsLog(folder, "sft", section, config={}, resume_step=2) as log:
        log.log(2, {"loss": 20.0})
    events = EventAccumulator(str(folder.logs / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0.0), (1, 1.0), (2, 20.0)]


WANDB_RUNS = """
import sys
from rlhf_ray.config.schema import LoggingSection, WandbSection
from rlhf_ray.reporting.metrics_log import MetricsLog
from rlhf_ray.reporting.run_folder import RunFolder

section = LoggingSection(wandb=WandbSection(project="unit", mode="offline"))
for resume_step in (0, 1):
    with MetricsLog(RunFolder(sys.argv[1]), "sft", section, config={}, resume_step=resume_step) as log:
        log.log(resume_step, {"unit/loss": 0.125 + resume_step})
"""


def test_wandb_offline_stays_in_the_run_folder_and_continues_its_run(tmp_path: Path) -> None:
    # In a process of its own: wandb's service has written everything only when the process has ended.
    folder = RunFolder(tmp_path / "run")
    command = [sys.executable, "-c", WANDB_RUNS, str(folder.path)]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("", "")
    run_id = (folder.logs / "wandb_run_id").read_text()
    written = sorted((folder.logs / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    contents = b"".join(path.read_bytes() for path in written)
    assert b"unit/loss" in contents and b"0.125" in contents and b"1.125" in contents
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_load_run_gives_the_stages_that_have_started(tmp_path: Path) -> None:
    root = RunFolder(tmp_path)
    root.begin(RunRecord("pipeline", {}, ("sft", "reward")), resume=False)
    stage = root.stage("sft")
    stage.begin(RunRecord("sft", {}), resume=False)
    with MetricsLog(stage, "sft", NOTHING_ELSE, config={}) as log:
        log.log(0, {"loss": 2.0})
    stage.record_summary({"prompts": 3})
    result = load_run(tmp_path)
    assert [found.name for found in result.stages] == ["sft"]
    assert result.stage("sft").metrics[0]["loss"] == 2.0
    assert result.stage("sft").summary == {"prompts": 3} and result.stage("sft").folder == stage.path
    assert load_run(stage.path).stages == result.stages


def test_read_metrics_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_metrics(tmp_path / "metrics.jsonl")
