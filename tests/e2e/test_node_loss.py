"""A machine of the cluster is lost, and later another one comes; or the driver itself is killed."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from benchmarks.victims import nodes
from launch.cli import main
from rlhf_ray.reporting.files import read_lines
from rlhf_ray.reporting.metrics_log import read_metrics
from rlhf_ray.reporting.run_folder import RunFolder
from tests.chaos import Killer
from tests.command_line import ROOT, CommandLine
from tests.e2e.runs import EXACT, assert_same_weights, untimed, write_config

pytestmark = [pytest.mark.actors, pytest.mark.slow, pytest.mark.timeout(600)]


def sft_config(workplace: Path, **cluster: object) -> str:
    tree = {
        **EXACT,
        "sft": {
            "dataset": {"path": "embedded:demonstrations", "limit": 16},
            "batch_size": 8,
            "max_length": 256,
            "num_epochs": 1000,
            "max_steps": 60,
        },
        "checkpoint": {"every": 5},
        "cluster": {"object_store_mib": 300, "call_timeout": 120, **cluster},
    }
    return write_config(workplace / "long-sft.yaml", tree).name


def test_the_stage_goes_on_when_a_node_is_lost_and_another_comes(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    config, run = sft_config(workplace), workplace / "runs" / "node-lost"
    with nodes(1) as cluster:

        def replace() -> None:
            cluster.kill(0)
            cluster.add()

        with Killer(run, [(7, 0.1, replace)]):
            assert main(["train", config, f"output_dir={run}", f"cluster.address={cluster.address}"]) == 0
        calm = workplace / "runs" / "node-kept"
        assert main(["train", config, f"output_dir={calm}", f"cluster.address={cluster.address}"]) == 0
    events = [(line["event"], line["name"]) for line in read_lines(run / "recoveries.jsonl")]
    assert events == [("lost", "all roles"), ("returned", "all roles")]
    resumed = re.search(r"^sft: resumed at step (\d+) of 60$", capfd.readouterr().out, re.MULTILINE)
    assert resumed is not None and int(resumed[1]) >= 5, "not from the beginning"
    kept = [{k: v for k, v in row.items() if not k.startswith("recovery/")} for row in untimed(run)]
    assert kept == untimed(calm)
    assert_same_weights(run, calm)


def test_a_driver_that_is_killed_takes_its_actors_with_it_and_is_resumed(rlhf_ray: CommandLine) -> None:
    config, run = sft_config(rlhf_ray.folder), rlhf_ray.folder / "runs" / "driver-killed"
    running = rlhf_ray.start("train", config, f"output_dir={run}")
    log = run / "metrics.jsonl"
    running.wait_until(lambda: log.exists() and len(read_lines(log)) >= 7, timeout=120)
    running.send(signal.SIGKILL)
    finished, left = running.wait_and_find_left(timeout=60)
    assert finished.code == -signal.SIGKILL
    # Ray's own agents look every now and then whether there is still something to serve.
    assert [process for process in left if "Agent" not in process] == []
    assert RunFolder(run).read().status == "running", "nobody was there to say otherwise"
    resumed = rlhf_ray.run("train", config, f"output_dir={run}", "--resume")
    assert resumed.code == 0, resumed.err
    assert [row["step"] for row in read_metrics(log)] == list(range(60))
