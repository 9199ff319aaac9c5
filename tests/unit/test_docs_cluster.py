"""The commands of docs/cluster.md, as they are written there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from launch.cli import main, parse

ROOT = Path(__file__).parents[2]


def commands() -> list[str]:
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    fences = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for fence in fences for line in fence.splitlines() if line.startswith("rlhf-ray ")]
    return [line.removeprefix("rlhf-ray ") for line in lines if "[" not in line]


def test_all_kinds_are_documented() -> None:
    assert {command.split()[0] for command in commands()} == {"submit", "jobs", "cluster"}
    kinds = {command.split()[1] for command in commands() if command.startswith("cluster ")}
    assert kinds == {"kuberay", "raycluster", "slurm", "autoscaler"}


@pytest.mark.parametrize("command", commands())
def test_documented_commands_work(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    parse(words)
    if words[0] == "cluster":
        assert main(words) == 0
        assert (tmp_path / words[words.index("--output") + 1]).read_text()
