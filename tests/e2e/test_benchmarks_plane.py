"""The benchmarks of the machinery run from the command line, in little."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import CommandLine

pytestmark = [pytest.mark.slow, pytest.mark.actors]


def rows(path: Path) -> dict[str, dict[str, object]]:
    return {row["case"]: row for row in json.loads(path.read_text())["results"]}


def test_control_plane(rlhf_ray: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    finished = rlhf_ray.run("bench", "control-plane", "--quick", "--model", "tiny", "--json", str(path))
    assert finished.code == 0, finished.err
    found = rows(path)
    assert list(found) == ["256 x 128", "256 x 128, driver", "growth 256 x 32 to 1024", "prepare 64 x 32"]
    assert all(sample > 0 for row in found.values() for sample in row["ours"])  # type: ignore[attr-defined]
    assert "block 1: baseline" in finished.out


def test_overhead(rlhf_ray: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    finished = rlhf_ray.run("bench", "overhead", "--quick", "--model", "tiny", "--json", str(path))
    assert finished.code == 0, finished.err
    found = rows(path)
    shares = [row["figure"] for case, row in found.items() if case.startswith("(")]
    assert {"(generate)", "(train_policy)", "(train_critic)", "(reference)", "(sync)"} <= found.keys()
    # Roles take turns: their shares and the overhead are the whole step.
    assert found[""]["figure"] + sum(shares) == pytest.approx(1.0, abs=0.01)  # type: ignore[operator, arg-type]
