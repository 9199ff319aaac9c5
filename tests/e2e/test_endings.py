"""Runs on actors that end by their deadline, go on with other engines, and hold secrets.

Minutes: python -m pytest -m slow tests/e2e/test_endings.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import psutil
import pytest

from rlhf_ray.reporting.run_folder import RunFolder
from tests.command_line import CommandLine, Running
from tests.e2e.runs import EXACT, ONLINE, rollouts, write_config
from tests.reward_servers import TOKEN, reference_server, running

pytestmark = [pytest.mark.actors, pytest.mark.slow, pytest.mark.timeout(900)]

CANARY = "canary-hunter2-hunter2"


def test_the_deadline_saves_and_ends_the_run(rlhf_ray: CommandLine) -> None:
    section = {"dataset": {"path": "embedded:demonstrations", "limit": 16}, "batch_size": 2, "max_length": 64}
    tree = {**EXACT, "sft": {**section, "num_epochs": 100_000}, "checkpoint": {"deadline": "25s"}}
    folder = rlhf_ray.folder / "runs" / "deadline"
    config = write_config(rlhf_ray.folder / "deadline.yaml", {"output_dir": str(folder), **tree})
    first = rlhf_ray.run("train", config)
    assert first.code == 130, first.err
    assert "deadline: stopping after this step and saving" in first.out
    assert "saved; go on with --resume" in first.err
    assert RunFolder(folder).read().status == "interrupted"
    (saved,) = (path.name for path in (folder / "checkpoints").iterdir())
    second = rlhf_ray.run("train", config, "--resume")
    assert second.code == 130, second.err
    (later,) = (path.name for path in (folder / "checkpoints").iterdir())
    assert later > saved, "each life has its own"


def test_other_engines_go_on_with_the_same_samples(rlhf_ray: CommandLine, online_run: Path) -> None:
    """vLLM in float32: the tokens are those of one engine; log-probs are rounded by the size of its batch."""
    folder = rlhf_ray.folder / "runs" / "more-engines"
    words = ("train", "online.yaml", f"output_dir={folder}")
    first = rlhf_ray.start(*words, REWARD_TAKES="2")
    first.wait_until((folder / "metrics.jsonl").exists, timeout=200)
    first.press_ctrl_c()
    assert first.wait(timeout=120).code == 130
    resumed = rlhf_ray.run(*words, "--resume", "placement.engine.count=2")
    assert resumed.code == 0, resumed.err
    sampled = ("prompt_id", "sample_id", "response_ids", "version_min", "reward/vowels")
    for step in range(5):
        ours, theirs = rollouts(folder, step), rollouts(online_run, step)
        assert [[row[name] for name in sampled] for row in ours] == [
            [row[name] for name in sampled] for row in theirs
        ]


def commands(run: Running) -> str:
    """The command lines of all processes of the run, as anybody on the machine may read them."""
    found = []
    for process in [run.process.pid, *run._alive()]:
        try:
            found += psutil.Process(getattr(process, "pid", process)).cmdline()
        except psutil.NoSuchProcess:
            continue
    return "\n".join(found)


def everything_below(folder: Path) -> str:
    return "\n".join(
        f"{path}\n{path.read_bytes().decode('latin-1')}" for path in folder.rglob("*") if path.is_file()
    )


@pytest.mark.parametrize("fails", [False, True])
def test_no_secret_is_written_down(rlhf_ray: CommandLine, fails: bool) -> None:
    """Of wandb, of a reward server, and of a person's own class; in a run that is done, and in one that
    fails. What is looked at: the run's folder, both streams, the process list, and Ray's own logs."""
    folder = rlhf_ray.folder / "runs" / f"secrets-{fails}"
    server = {"type": "http", "name": "served", "token_env": "MY_TOKEN", "on_error": "raise"}
    with running(reference_server("tests.fakes:raises" if fails else "tests.fakes:num_vowels")) as url:
        online = {**ONLINE["online"], "num_steps": 2, "rewards": [{**server, "url": url}]}  # type: ignore[dict-item]
        tree = {
            **ONLINE,
            "output_dir": str(folder),
            "online": online,
            "engine": {"backend": "transformers", "dtype": "float32"},
            "logging": {"wandb": {"api_key": CANARY, "mode": "offline"}, "tensorboard": True},
        }
        config = write_config(rlhf_ray.folder / "secrets.yaml", tree)
        began = tempfile.gettempdir()
        run = rlhf_ray.start("train", config, MY_TOKEN=TOKEN, WANDB_API_KEY=CANARY + "-too")
        run.wait_until((folder / "metrics.jsonl").exists, timeout=200)
        listed = commands(run)
        finished = run.wait(200)
    assert finished.code == int(fails), finished.err
    assert ("KeyError" in finished.err) == fails
    session = (Path(began) / "ray" / "session_latest").resolve()
    seen = {
        "folder": everything_below(folder),
        "streams": finished.out + finished.err,
        "process list": listed,
        "Ray": everything_below(session / "logs") if session.exists() else "",
    }
    assert "raylet" in seen["process list"] and json.loads((folder / "run.json").read_text())["config"]
    for where, text in seen.items():
        assert CANARY not in text, where
        assert TOKEN not in text, where
