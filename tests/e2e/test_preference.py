"""Online DPO by the command line: preferences and preference optimisation, and both again; then other
algorithms on what was collected."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rlhf_ray.reporting.files import read_lines, write_text
from rlhf_ray.reporting.metrics_log import read_metrics
from rlhf_ray.reporting.run_folder import RunFolder
from tests.command_line import CommandLine, Finished
from tests.e2e.runs import EXACT, Tree, contents, untimed, weights, write_config

pytestmark = [
    pytest.mark.actors,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # the first test waits for whole runs
]

STAGES = ("preferences", "preference", "preferences-2", "preference-2")
LEARNING: Tree = {
    "held_out": 0.25,
    "batch_size": 4,
    "max_length": 256,
    "max_steps": 3,
    "optimizer": {"learning_rate": 1e-3},
}
CONFIG: Tree = {
    **EXACT,
    "output_dir": "runs/online-dpo",
    "engine": {"backend": "transformers", "dtype": "float32"},
    "pipeline": ["preferences", "preference", "preferences", "preference"],
    "preferences": {
        "dataset": {"path": "embedded:prompts", "limit": 12},
        "num_generations": 2,
        "pairs_per_prompt": 1,
        "max_completion_length": 12,
        "prompts_per_step": 12,
        "annotators": [{"type": "simulated", "function": "my_rewards:vowels"}],
    },
    "preference": {"algorithm": "dpo", **LEARNING},
}


@pytest.fixture(scope="module")
def finished(rlhf_ray: CommandLine) -> Finished:
    write_config(rlhf_ray.folder / "online-dpo.yaml", CONFIG)
    return rlhf_ray.run("train", "online-dpo.yaml", timeout=280)


@pytest.fixture(scope="module")
def run(rlhf_ray: CommandLine, finished: Finished) -> Path:
    assert finished.code == 0, finished.err
    return rlhf_ray.folder / "runs" / "online-dpo"


def test_every_turn_has_its_folder(finished: Finished, run: Path) -> None:
    assert finished.err == ""
    assert RunFolder(run).read().stages == STAGES
    for stage in STAGES:
        record = RunFolder(run / stage).read()
        assert (record.name, record.status) == (stage, "done")
        assert f"{stage}: " in finished.out
        assert {row["stage"] for row in read_metrics(run / stage / "metrics.jsonl")} == {stage}


def test_each_turn_goes_on_from_the_one_before(run: Path) -> None:
    parents = [RunFolder(run / stage).read().parents for stage in STAGES]
    first = "runs/online-dpo/preference/model"
    assert parents[:2] == [{"model": "tiny"}, {"model": "tiny", "reference": "tiny"}]
    assert parents[2:] == [{"model": first}, {"model": first, "reference": first}]
    (data,) = RunFolder(run / "preference-2").read().data
    assert data == "runs/online-dpo/preferences-2/preferences.jsonl"
    start, one, two = (
        weights(folder)["model.layers.0.self_attn.q_proj.weight"]
        for folder in (run.parents[1] / "tiny", run / "preference" / "model", run / "preference-2" / "model")
    )
    assert 1e-3 < (start - one).abs().max() < 1e-2, "AdamW moves a weight by about its rate in a step"
    assert 1e-3 < (one - two).abs().max() < 1e-2


def test_the_second_turn_asks_about_the_same_prompts_and_gets_other_answers(run: Path) -> None:
    one, two = (list(read_lines(run / stage / "preferences.jsonl")) for stage in STAGES[::2])
    answers = [{str(row[side]) for row in rows for side in ("chosen", "rejected")} for rows in (one, two)]
    assert len(answers[0] & answers[1]) < 3
    prompts = [{str(row["prompt"]) for row in rows} for rows in (one, two)]
    assert len(prompts[0] & prompts[1]) > 6


def test_every_turn_starts_at_its_reference(run: Path) -> None:
    for stage in STAGES[1::2]:
        rows = read_metrics(run / stage / "metrics.jsonl")
        assert [row["step"] for row in rows] == [0, 1, 2]
        assert rows[0]["preference/loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert abs(float(rows[0]["rewards/margins"])) < 1e-4
        assert rows[2]["preference/loss"] != pytest.approx(math.log(2), abs=1e-3)
        assert {"eval/accuracy", "eval/length_baseline", "eval/calibration_error"} <= rows[2].keys()
        assert len(list((run / stage / "reference").glob("*.npz"))) == 2


def test_resuming_skips_what_is_done_and_repeats_what_is_not(rlhf_ray: CommandLine, run: Path) -> None:
    """The last stage as if the power had gone before its end."""
    folder = RunFolder(run / "preference-2")
    before, record = contents(run), folder.read()
    steps, model = untimed(folder.path), weights(folder.model)
    text = folder.run_path.read_text().replace('"status": "done"', '"status": "running"')
    write_text(folder.run_path, text)
    again = rlhf_ray.run("train", "online-dpo.yaml", "--resume")
    assert again.code == 0, again.err
    for stage in STAGES[:3]:
        assert f"{stage}: done before\n" in again.out
    assert folder.read().num_resumed == record.num_resumed + 1
    assert untimed(folder.path) == steps
    assert all(torch.equal(tensor, model[name]) for name, tensor in weights(folder.model).items())
    after = contents(run)
    kept = {name for name in before if name.startswith("preferences") or name.endswith(".npz")}
    assert kept and all(after[name] == before[name] for name in kept)


def on_what_was_collected(rlhf_ray: CommandLine, **options: object) -> RunFolder:
    """A run of the preference stage alone, on the first turn's pairs."""
    tree = {name: section for name, section in CONFIG.items() if name not in ("pipeline", "preferences")}
    collected = {"path": "runs/online-dpo/preferences/preferences.jsonl"}
    folder = f"runs/{options['algorithm']}"
    tree |= {"output_dir": folder, "preference": {**LEARNING, "dataset": collected, **options}}
    write_config(rlhf_ray.folder / "alone.yaml", tree)
    ended = rlhf_ray.run("train", "alone.yaml", "placement.policy.count=2", "training.zero_stage=3")
    assert ended.code == 0, ended.err
    return RunFolder(rlhf_ray.folder / folder)


def test_kto_takes_pairs_apart_and_its_reference_may_answer_in_every_step(
    rlhf_ray: CommandLine, run: Path
) -> None:
    """An epoch in steps of 6 answers, by two ranks."""
    options = {"batch_size": 6, "max_steps": None, "cache_reference": False}
    folder = on_what_was_collected(rlhf_ray, algorithm="kto", **options)
    rows = read_metrics(folder.metrics_path)
    pairs = len(list(read_lines(run / "preferences" / "preferences.jsonl"))) - int(rows[-1]["eval/num_pairs"])
    assert len(rows) == -(-2 * pairs // 6) and float(rows[-1]["epoch"]) >= 1
    assert rows[0]["preference/loss"] == pytest.approx(0.5, abs=1e-4)
    assert all(float(row["preference/kl"]) >= 0 for row in rows)
    assert not (folder.path / "reference").exists() and (folder.logs / "reference.log").exists()


def test_no_reference_is_started_where_none_is_needed(rlhf_ray: CommandLine, run: Path) -> None:
    folder = on_what_was_collected(rlhf_ray, algorithm="orpo", max_steps=1)
    assert 0 <= float(read_metrics(folder.metrics_path)[-1]["eval/accuracy"]) <= 1
    assert folder.read().parents == {"model": "tiny"}
    assert not (folder.path / "reference").exists() and not (folder.logs / "reference.log").exists()
