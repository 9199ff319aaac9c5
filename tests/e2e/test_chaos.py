"""A run whose processes are killed is the run that would have been."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cli import main
from rlhf_ray.reporting.files import read_lines
from rlhf_ray.reporting.run_folder import RunFolder
from tests.chaos import Killer
from tests.command_line import ROOT
from tests.e2e.runs import assert_same_weights, rollouts, untimed

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]

STEPS = 6


def train(name: str, *overrides: str) -> int:
    """The exit code of a run on the transformers engine, into `runs/<name>`."""
    words = ["train", "online.yaml", f"output_dir=runs/{name}", "engine.backend=transformers"]
    return main([*words, f"online.num_steps={STEPS}", *overrides])


@pytest.fixture(autouse=True)
def in_the_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(scope="module")
def calm(workplace: Path, ray_cluster: None) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        patch.setenv("PYTHONPATH", str(ROOT))
        assert train("calm") == 0
    return workplace / "runs" / "calm"


def events(run: Path) -> list[tuple[str, str]]:
    return [(str(line["event"]), str(line["name"])) for line in read_lines(run / "recoveries.jsonl")]


def assert_same_run(run: Path, calm: Path) -> None:
    """Metrics, samples and weights, but for what is said of the losses."""
    kept = [{k: v for k, v in row.items() if not k.startswith("recovery/")} for row in untimed(run)]
    assert kept == untimed(calm)
    for step in range(STEPS):
        assert rollouts(run, step) == rollouts(calm, step)
    assert (run / "eval.jsonl").read_text() == (calm / "eval.jsonl").read_text()
    assert_same_weights(run, calm)
    record = RunFolder(run).read()
    assert (record.status, record.num_resumed) == ("done", 0)


def test_engines_and_frozen_models_are_replaced_in_their_place(
    workplace: Path, calm: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = workplace / "runs" / "pure"
    with Killer(run, [(1, 0.05, "engine"), (2, 0.0, "reward"), (3, 0.1, "reference")]) as killer:
        assert train("pure") == 0
    assert killer.killed == ["engine", "reward", "reference"]
    assert_same_run(run, calm)
    assert events(run) == [(event, name) for name in killer.killed for event in ("lost", "returned")]
    counts = [row.get("recovery/count", 0.0) for row in untimed(run)]
    assert sum(map(float, counts)) == 3.0
    assert (
        "its process died; its log, and the kernel's, may say why; engine starts again\n"
        in capfd.readouterr().out
    )


def test_a_lost_rank_takes_the_stage_back_to_its_checkpoint(
    workplace: Path, calm: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = workplace / "runs" / "rebuilt"
    with Killer(run, [(3, 0.1, "policy")]) as killer:
        assert train("rebuilt") == 0
    assert killer.killed == ["policy"]
    assert_same_run(run, calm)
    assert events(run) == [("lost", "all roles"), ("returned", "all roles")]
    assert "online: resumed at step 2 of 6\n" in capfd.readouterr().out
