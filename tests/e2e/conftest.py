"""Runs that several modules look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import CommandLine


@pytest.fixture(scope="session")
def online_run(rlhf_ray: CommandLine) -> Path:
    """PPO by one rank and one vLLM engine, from beginning to end."""
    finished = rlhf_ray.run("train", "online.yaml")
    assert finished.code == 0, finished.err
    return rlhf_ray.folder / "runs" / "online"
