"""Runs that several modules look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import CommandLine


@pytest.fixture(scope="session")
def online_run(rlhf_ray: CommandLine) -> Path:
    """PPO by one rank and one vLLM engine, from beginning to end."""
    # A cluster that a person works with elsewhere is not joined by a run that starts its own.
    finished = rlhf_ray.run("train", "online.yaml", RAY_ADDRESS="127.0.0.1:9")
    assert finished.code == 0, finished.err
    return rlhf_ray.folder / "runs" / "online"
