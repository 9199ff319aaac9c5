"""Runs as jobs of a Ray cluster with its own Jobs server: results, logs, stops, retries and secrets."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_ray.reporting.metrics_log import read_metrics
from rlhf_ray.reporting.run_folder import RunFolder
from tests.command_line import CommandLine, Finished, Running
from tests.cut_proxy import cut_proxy
from tests.e2e.runs import EXACT, PREAMBLE, Tree, write_config
from tests.ray_heads import RayHead, ray_head
from tests.tiny import tiny_model_folder

pytestmark = [pytest.mark.actors, pytest.mark.slow]

SECRET = "a-key-that-nobody-may-see"
FINGERPRINT = hashlib.sha256(SECRET.encode()).hexdigest()

GRADER = f'''\
"""A reward that wants a key, one that is slow, and one that breaks."""

import hashlib
import os
import time


def keyed(prompts, completions, **columns):
    key = os.environ["GRADER_KEY"]
    assert hashlib.sha256(key.encode()).hexdigest() == "{FINGERPRINT}"
    return [float(len(text)) for text in completions]


def slow(prompts, completions, **columns):
    time.sleep(8)
    return [float(len(text)) for text in completions]


def broken(prompts, completions, **columns):
    raise ZeroDivisionError("no grade")
'''

SFT: Tree = {
    **EXACT,
    "sft": {
        "dataset": {"path": "embedded:demonstrations", "limit": 16},
        "batch_size": 2,
        "max_length": 64,
        "num_epochs": 100_000,
    },
    "checkpoint": {"every": 1},
}
ONLINE: Tree = {
    **EXACT,
    "engine": {"backend": "transformers", "dtype": "float32"},
    "online": {
        "algorithm": "rloo",
        "dataset": {"path": "prompts.jsonl"},
        "rewards": [{"type": "function", "name": "keyed", "function": "grader:keyed"}],
        "num_steps": 1,
        "prompts_per_step": 2,
        "num_generations": 2,
        "max_prompt_length": 300,
        "max_completion_length": 8,
    },
}


class Client:
    """The command line of somebody who has the cluster's token."""

    def __init__(self, head: RayHead, folder: Path) -> None:
        self.head = head
        self.command_line = CommandLine(folder)

    @property
    def folder(self) -> Path:
        return self.command_line.folder

    def start(self, *words: str | Path, **environment: str) -> Running:
        own = {"RAY_AUTH_TOKEN": self.head.token, "GRADER_KEY": SECRET, "RAY_ADDRESS": "127.0.0.1:9"}
        where = () if "--address" in words else ("--address", self.head.address)
        return self.command_line.start(*words, *where, **{**own, **environment})

    def run(self, *words: str | Path, **environment: str) -> Finished:
        return self.start(*words, **environment).wait(timeout=240)

    def ask(self, path: str) -> Any:
        """The Jobs server itself, whatever our client makes of it."""
        headers = {"Authorization": f"Bearer {self.head.token}"}
        request = urllib.request.Request(f"{self.head.address}/api/jobs/{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def jobs(self) -> list[dict[str, object]]:
        return [job for job in self.ask("") if job["submission_id"]]

    def drivers(self) -> list[psutil.Process]:
        """The processes of `rlhf-ray train` on the cluster."""
        return [p for p in self.head.processes() if p.is_running() and " -m launch train" in cmdline(p)]


def cmdline(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """In a folder that is no repository, with a model, data, a reward, and configurations elsewhere."""
    folder = tmp_path_factory.mktemp("submit") / "here"
    tiny_model_folder(folder / "tiny")
    (folder / "grader.py").write_text(GRADER)
    lines = [json.dumps({"prompt": f"{PREAMBLE}How long do I boil {n} eggs?"}) + "\n" for n in range(4)]
    (folder / "prompts.jsonl").write_text("".join(lines))
    (folder.parent / "elsewhere").mkdir()
    write_config(folder.parent / "elsewhere" / "online.yaml", {"output_dir": "runs/online", **ONLINE})
    write_config(folder / "endless.yaml", {"output_dir": "runs/endless", **SFT})
    with ray_head() as head:
        yield Client(head, folder)


def test_a_run_with_a_secret(client: Client) -> None:
    running = client.start("submit", "../elsewhere/online.yaml", "online.num_steps=2", "--env", "GRADER_KEY")
    seen = set()

    def is_over() -> bool:
        seen.update(cmdline(process) for process in client.head.processes())
        return running.process.poll() is not None

    while not is_over():
        pass
    finished = running.wait(timeout=10)
    assert finished.code == 0, finished.err + finished.out
    assert re.search(r"^rlhf-ray: submitted as raysubmit_\w+ \(0\.\d MiB\)", finished.err)
    assert finished.err.endswith(": done\n")
    assert finished.out.count("online") > 2, "the log of the run"
    output = client.folder / "runs" / "online"
    assert len(read_metrics(output / "metrics.jsonl")) == 2
    assert (output / "model" / "model.safetensors").exists()
    assert any("launch.submission.entrypoint" in line for line in seen), "the job was looked at"

    assert not [line for line in seen if SECRET in line]
    assert SECRET not in json.dumps(client.jobs()) + finished.out + finished.err
    assert SECRET not in json.dumps(RunFolder(output).read().config)
    logs = client.head.logged()
    agents = [text for path, text in logs.items() if "runtime_env_agent" in path.name]
    assert any("RAY_JOB_STOP_WAIT_TIME_S" in text for text in agents), "where Ray writes a job's env_vars"
    assert not [path for path, text in logs.items() if SECRET in text]
    written = [*output.rglob("*"), *client.head.folder.rglob("runtime_resources/**/*")]
    assert not [path for path in written if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_exit_codes_come_through(client: Client) -> None:
    lacking = client.run(
        "submit", "endless.yaml", "placement.policy.cpus=100", "cluster.start_timeout=1", "output_dir=runs/no"
    )
    assert lacking.code == 2
    assert "rlhf-ray: placement: " in lacking.out or "asks for 1 x policy with 100 CPU" in lacking.out
    failing = client.run(
        "submit", "../elsewhere/online.yaml", "online.rewards.0.function=grader:broken", "output_dir=runs/bad"
    )
    assert failing.code == 1, failing.err
    assert "no grade" in failing.out


def test_mistakes_are_said_before_anything_is_sent(client: Client) -> None:
    before = len(client.jobs())
    wrong = client.run("submit", "endless.yaml", "sft.batch_siz=1", "sft.dataset.path=nowhere.jsonl")
    assert wrong.code == 2
    assert wrong.err.startswith("rlhf-ray: 2 mistakes\n")
    shown = client.run("submit", "endless.yaml", "logging.wandb.project=x", f"logging.wandb.api_key={SECRET}")
    assert (shown.code, SECRET in shown.err) == (2, False)
    assert "logging.wandb.api_key: would lie in the job's package" in shown.err
    stranger = client.run("submit", "endless.yaml", RAY_AUTH_TOKEN="not-it")
    assert stranger.code == 2
    assert "the cluster asks for its token, and refuses the one that was sent" in stranger.err
    assert len(client.jobs()) == before


def test_stopping_saves(client: Client) -> None:
    """Also a step that takes longer than the 3 s that Ray gives a job by itself."""
    words = ["online.num_steps=1000", "online.rewards.0.function=grader:slow", "output_dir=runs/stopped"]
    submitted = client.run("submit", "../elsewhere/online.yaml", "checkpoint.every=1", *words, "--no-wait")
    assert submitted.code == 0, submitted.err
    job_id = submitted.out.strip()
    assert re.fullmatch(r"raysubmit_\w+", job_id)
    listed = client.run("jobs", "list")
    assert re.search(rf"^{job_id} +(PENDING|RUNNING) .*runs/stopped$", listed.out, re.MULTILINE)
    following = client.start("jobs", "follow", job_id)
    output = client.folder / "runs" / "stopped"
    following.wait_until(lambda: any((output / "checkpoints").glob("step-*")), timeout=120)
    following.send(signal.SIGINT)
    detached = following.wait(timeout=30)
    assert detached.code == 130
    assert f"{job_id} goes on" in detached.err
    again = client.start("jobs", "follow", job_id)
    saved = {path.name for path in (output / "checkpoints").glob("step-*")}
    again.wait_until(
        lambda: bool({path.name for path in (output / "checkpoints").glob("step-*")} - saved), timeout=60
    )
    stopped = client.run("jobs", "stop", job_id)
    assert stopped.code == 0, stopped.err
    ended = again.wait(timeout=120)
    assert ended.code == 130
    assert "stopping after this step and saving" in ended.out, "the log from its beginning"
    assert RunFolder(output).read().status == "interrupted"
    assert "is over: stopped" in client.run("jobs", "stop", job_id).err
    assert "no job raysubmit_none" in client.run("jobs", "follow", "raysubmit_none").err


def test_the_log_survives_lost_connections(client: Client) -> None:
    output = client.folder / "runs" / "cut"
    with cut_proxy(int(client.head.address.rpartition(":")[2])) as proxy:
        words = ["sft.max_steps=1500", "output_dir=runs/cut", "--address", f"http://127.0.0.1:{proxy.port}"]
        running = client.start("submit", "endless.yaml", "checkpoint.every=100", *words)
        running.wait_until(lambda: any((output / "checkpoints").glob("step-*")), timeout=120)
        proxy.cut(refusing=True)
        running.wait_until(lambda: "connection lost" in running.err.read_text(), timeout=60)
        proxy.cut(refusing=False)
        finished = running.wait(timeout=200)
    assert proxy.num_cut > 0
    assert finished.code == 0, finished.err
    job_id = re.findall(r"raysubmit_\w+", finished.err)[0]
    assert finished.out == client.ask(f"{job_id}/logs")["logs"], "every line once, in order"


def test_a_killed_driver_is_started_again(client: Client) -> None:
    output = client.folder / "runs" / "killed"
    words = ["sft.max_steps=400", "output_dir=runs/killed", "--max-retries", "1"]
    running = client.start("submit", "endless.yaml", *words)
    running.wait_until(lambda: any((output / "checkpoints").glob("step-*")), timeout=120)
    (driver,) = client.drivers()
    driver.kill()
    finished = running.wait(timeout=200)
    assert finished.code == 0, finished.err + finished.out
    assert (
        "the driver was killed by signal 9; going on from its last checkpoint (retry 1 of 1)" in finished.out
    )
    record = RunFolder(output).read()
    assert (record.status, record.num_resumed) == ("done", 1)
    assert [row["step"] for row in read_metrics(output / "metrics.jsonl")] == list(range(400))
