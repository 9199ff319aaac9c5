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

pytestmark = [
    pytest.mark.slow,  # the default tests have tests/actors/test_replacement.py and test_republish.py
    pytest.mark.actors,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(600),
]

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


def assert_same_run(run: Path, calm: Path, num_steps: int = STEPS) -> None:
    """Metrics, samples and weights, but for what is said of the losses."""
    kept = [{k: v for k, v in row.items() if not k.startswith("recovery/")} for row in untimed(run)]
    assert kept == untimed(calm)
    for step in range(num_steps):
        assert rollouts(run, step) == rollouts(calm, step)
    assert (run / "eval.jsonl").read_text() == (calm / "eval.jsonl").read_text()
    assert_same_weights(run, calm)
    record = RunFolder(run).read()
    assert (record.status, record.num_resumed) == ("done", 0)


def test_what_is_killed_is_replaced_or_the_stage_goes_back_to_its_checkpoint(
    workplace: Path, online_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On vLLM."""
    run = workplace / "runs" / "battered-roles"
    with Killer(run, [(1, 0.05, "engine"), (2, 0.0, "reward"), (3, 0.1, "policy")]) as killer:
        assert main(["train", "online.yaml", f"output_dir={run}"]) == 0
    assert killer.killed == ["engine", "reward", "policy"]
    assert_same_run(run, online_run, num_steps=5)
    assert events(run) == [
        (event, name) for name in ("engine", "reward", "all roles") for event in ("lost", "returned")
    ]
    counts = [row.get("recovery/count", 0.0) for row in untimed(run)]
    assert sum(map(float, counts)) >= 1.0, "those before the checkpoint that it went back to are kept"
    said = capfd.readouterr().out
    assert "failed: its process died; its log, and the kernel's, may say why; engine starts again\n" in said
    assert "\nreward: back after " in said
    assert "online: resumed at step 2 of 5\n" in said


@pytest.mark.parametrize("whom", ["reference", "critic", "experience", "engine"])
def test_every_other_role_may_die_before_there_is_a_checkpoint(
    workplace: Path, calm: Path, whom: str
) -> None:
    """The engine too: of those who wait for its first answers, none has heard of it."""
    run = workplace / "runs" / f"without-{whom}"
    with Killer(run, [(0, 0.2, whom)]) as killer:
        assert train(f"without-{whom}") == 0
    assert killer.killed == [whom]
    assert_same_run(run, calm)


def test_frozen_roles_that_share_devices_are_replaced_in_their_place(workplace: Path) -> None:
    shared = ["placement.mode=colocated", "training.zero_stage=1"]
    assert train("shared-calm", *shared) == 0
    run = workplace / "runs" / "shared"
    with Killer(run, [(1, 0.0, "reference"), (3, 0.1, "reward")]) as killer:
        assert train("shared", *shared) == 0
    assert killer.killed == ["reference", "reward"]
    assert_same_run(run, workplace / "runs" / "shared-calm")
    assert events(run) == [(event, name) for name in killer.killed for event in ("lost", "returned")]
