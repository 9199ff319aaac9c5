"""The online stage on the transformers engine, and on engines and rewards that fail."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.cli import main
from launch.stages import generation
from rlhf_ray.reporting.metrics_log import read_metrics
from rlhf_ray.reporting.run_folder import RunFolder
from tests.command_line import ROOT
from tests.e2e.runs import rollouts

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(autouse=True)
def in_the_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def train(name: str, *overrides: str) -> int:
    """The exit code of a run on the transformers engine, into `runs/<name>`."""
    words = ["train", "online.yaml", f"output_dir=runs/{name}", "engine.backend=transformers"]
    return main([*words, "online.num_steps=3", *overrides])


def test_the_transformers_engine_runs_the_online_stage(workplace: Path) -> None:
    assert train("transformers", "sync.verify_first=1", "sync.verify_every=100") == 0
    run = workplace / "runs" / "transformers"
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert abs(float(rows[0]["kl/per_token"])) < 1e-6
    assert rows[0]["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert float(rows[0]["sync/probe_mean"]) < 1e-4
    assert float(rows[0]["sync/probe_moved"]) > 0.01
    # Not verified: the sampler's own log-probs tell that the second and third publications arrived as well.
    for row in rows[1:]:
        assert "sync/probe_mean" not in row
        assert float(row["kl/per_sequence"]) > 0.01
        assert float(row["mismatch/logprob_diff_max"]) < 1e-4
    for step in range(3):
        assert {(row["version_min"], row["version_max"]) for row in rollouts(run, step)} == {(step, step)}


# A policy that hardly moved would pass any comparison of log-probs; that the engine did not follow tells.
@pytest.mark.parametrize(
    ("learning_rate", "said"),
    [
        pytest.param(1e-3, "more than sync.tolerance=0.06", marks=pytest.mark.slow),
        (2e-5, "the engine still samples with earlier weights"),
    ],
)
def test_an_engine_that_ignores_its_weights_stops_the_run(
    learning_rate: float,
    said: str,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    name = f"deaf-{learning_rate:g}"
    monkeypatch.setitem(generation._FACTORIES, "transformers", "tests.e2e.generators:DeafGenerator")
    code = train(name, f"online.optimizer.learning_rate={learning_rate}", "sync.tolerance=0.06")
    assert code == 1
    err = capfd.readouterr().err
    assert re.search(rf"^rlhf-ray: WeightSyncError: .*{re.escape(said)}", err, re.MULTILINE)
    assert "Traceback" not in err
    folder = RunFolder(workplace / "runs" / name)
    assert "Traceback" in (folder.path / "logs" / "driver.log").read_text()
    record = folder.read()
    assert record.status == "failed"
    assert record.error is not None and record.error.startswith("WeightSyncError: ")
    assert not (folder.path / "model").exists()
    # The step whose weights did not arrive is not logged as done.
    assert read_metrics(folder.metrics_path) == []


def test_a_reward_that_raises_stops_the_run_and_is_named(
    workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (workplace / "bad_rewards.py").write_text(
        "def picky(prompts, completions, **columns):\n    raise ValueError('not like this')\n"
    )
    function = "online.rewards=[{type: function, name: picky, function: 'bad_rewards:picky'}]"
    assert train("picky", function) == 1
    err = capfd.readouterr().err
    assert "rlhf-ray: RewardError: reward 'picky' raised ValueError: not like this" in err
    assert "Traceback" not in err
