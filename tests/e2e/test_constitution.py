"""Constitutional AI by real actors on the tiny model: revise and learn, AI feedback, a reward model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.cli import main
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.constitution import ANSWER_LEAD, OPTIONS, choice_messages, load_constitution
from rlhf_ray.loops.preferences import read_part
from rlhf_ray.reporting.metrics_log import read_metrics
from rlhf_ray.reporting.revisions import read_revisions
from rlhf_ray.reporting.run_folder import RunFolder
from tests.command_line import ROOT
from tests.e2e.runs import EXACT, Tree, assert_same_weights, untimed, write_config
from tests.tiny import tiny_model_folder, tiny_tokenizer

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_cluster")]

CONSTITUTION = """\
principles:
  - {id: kind, critique: "What is rude?", revision: "Be kind.", choice: "Kinder?", source: s}
  - {id: honest, critique: "What is false?", revision: "Be honest.", choice: "Truer?", source: s}
"""
SHORT_ANSWERS = [{"prompt": f"Boil {number} eggs?", "completion": "ok"} for number in range(8)]

TREE: Tree = {
    **EXACT,
    "model": {"path": "terse"},
    "pipeline": ["constitution", "preferences", "reward"],
    "constitution": {
        "principles": "own.yaml",
        "dataset": {"path": "embedded:red-team", "limit": 8},
        "num_generations": 2,
        "max_completion_length": 16,
        "max_critique_length": 8,
        "prompts_per_step": 4,
        "helpful_dataset": {"path": "short.jsonl"},
        "eval_dataset": {"path": "short.jsonl"},
        "batch_size": 4,
        "max_steps": 2,
        "optimizer": {"learning_rate": 1e-4},
    },
    "preferences": {
        "dataset": {"path": "embedded:red-team", "split": "test", "limit": 6},
        "num_generations": 3,
        "pairs_per_prompt": 2,
        "max_completion_length": 12,
        "prompts_per_step": 3,
        "annotators": [
            {"type": "constitution", "name": "own", "principles": "own.yaml", "num_principles": 2},
            {"type": "constitution", "name": "start", "principles": "own.yaml", "model": {"path": "tiny"}},
        ],
    },
    "reward": {"held_out": 0.25, "batch_size": 4, "max_length": 256, "max_steps": 2},
    "engine": {"dtype": "float32", "backend": "transformers"},
}


def terse_model(folder: Path) -> None:
    """A tiny model that ends its answers soon, which one of random weights hardly ever does."""
    tiny_model_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    formatter = ChatFormatter(tiny_tokenizer(), (2,))
    rows = [
        formatter.sft_row(
            [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        )
        for row in SHORT_ANSWERS
    ]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for ids, is_target in rows:
        labels = [token if target else -100 for token, target in zip(ids, is_target, strict=True)]
        model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def run(workplace: Path, ray_cluster: None) -> Path:
    (workplace / "own.yaml").write_text(CONSTITUTION)
    (workplace / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SHORT_ANSWERS))
    terse_model(workplace / "terse")
    write_config(workplace / "constitution.yaml", {"output_dir": "runs/constitution", **TREE})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        patch.setenv("PYTHONPATH", str(ROOT))
        assert main(["train", "constitution.yaml"]) == 0
    return workplace / "runs" / "constitution"


def test_every_critique_and_revision_is_kept(run: Path) -> None:
    revisions = read_revisions(run / "constitution" / "constitution.jsonl")
    assert len(revisions) == 8 * 2
    used = [each for each in revisions if each.outcome == "used"]
    assert used
    for each in used:
        (past,) = each.rounds
        assert past.principle in ("kind", "honest")
        assert past.critique and past.revision == each.final != each.answer
    trained_on = [
        json.loads(line) for line in (run / "constitution" / "revisions.jsonl").read_text().splitlines()
    ]
    assert [row["messages"] for row in trained_on] == [
        [*each.prompt, {"role": "assistant", "content": each.final}] for each in used
    ]
    assert "answers were revised: used" in (run / "constitution" / "report.md").read_text()


def test_revising_and_learning_are_steps_of_one_stage(run: Path, workplace: Path) -> None:
    rows = read_metrics(run / "constitution" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert ["constitution/answers" in row for row in rows] == [True, True, False, False]
    assert ["sft/loss" in row for row in rows] == [False, False, True, True]
    metrics = RunFolder(run / "constitution").read().metrics
    assert metrics["constitution/answers"] == 16.0
    assert "eval/loss" in metrics
    start, end = (
        load_file(folder / "model.safetensors")
        for folder in (workplace / "terse", run / "constitution" / "model")
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    # AdamW moves a weight by about its learning rate in each of two steps.
    assert 1e-5 < (start[name] - end[name]).abs().max() < 4e-4
    record = RunFolder(run / "constitution").read()
    assert record.parents["model"] == "terse"
    assert "own.yaml" in record.data


def test_soft_labels_are_what_the_feedback_models_said(run: Path) -> None:
    parts = sorted((run / "preferences" / "rollouts").glob("pairs-*.jsonl"))
    pairs = [pair for part in parts for pair in read_part(part)]
    assert pairs
    for pair in pairs:
        assert [said.annotator for said in pair.judgements] == ["own", "own", "start"]
        assert len({said.principle for said in pair.judgements[:2]}) == 2
        own, start = pair.probabilities["own"], pair.probabilities["start"]
        assert own == pytest.approx(sum(said.probability for said in pair.judgements[:2]) / 2)
        assert start == pair.judgements[2].probability
    labels = [
        json.loads(line)["soft_label"]
        for line in (run / "preferences" / "preferences.jsonl").read_text().splitlines()
    ]
    means = [sum(pair.probabilities.values()) / 2 for pair in pairs if pair.preferred is not None]
    assert labels == [pytest.approx(max(mean, 1 - mean)) for mean in means]
    metrics = RunFolder(run / "preferences").read().metrics
    assert 0 <= metrics["preferences/order_disagreement"] <= 1
    assert metrics["preferences/unjudged"] == 0.0
    asked = {name: value for name, value in metrics.items() if name.startswith("preferences/principle/")}
    assert sum(asked.values()) == 3 * len(pairs)


def test_the_feedback_model_that_is_named_is_the_one_that_judged(run: Path, workplace: Path) -> None:
    """Its probability of the first pair, by plain transformers."""
    pair = read_part(run / "preferences" / "rollouts" / "pairs-000000.jsonl")[0]
    tokenizer = AutoTokenizer.from_pretrained(workplace / "tiny")
    principles = load_constitution(str(workplace / "own.yaml"))
    formatter = ChatFormatter(tokenizer, (2,))
    for said, folder in (
        (pair.judgements[2], workplace / "tiny"),
        (pair.judgements[0], run / "constitution" / "model"),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        messages = choice_messages(principles[said.principle], pair.messages, pair.answers)
        prefix = formatter.prompt_ids(messages) + formatter.text_ids(ANSWER_LEAD)
        logprobs = []
        for option in OPTIONS:
            ids = formatter.text_ids(option)
            with torch.no_grad():
                all_of_them = model(torch.tensor([[*prefix, *ids]])).logits[0].log_softmax(-1)
            at = range(len(prefix) - 1, len(prefix) + len(ids) - 1)
            logprobs.append(sum(float(all_of_them[i, token]) for i, token in zip(at, ids, strict=True)))
        expected = torch.tensor(logprobs).softmax(0)[1]
        assert said.straight == pytest.approx(float(expected), abs=1e-4)


def test_the_reward_model_learned_from_them(run: Path) -> None:
    record = RunFolder(run / "reward").read()
    assert record.status == "done"
    assert any("preferences.jsonl" in name for name in record.data)
    assert record.parents["model"].endswith("constitution/model")


def test_report_shows_rates_and_examples(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert "constitution: answers and their revisions" in out
    assert re.search(r"16 answers were revised: used \d+%", out)
    assert re.search(r"^ *critique \((kind|honest)\)", out, re.MULTILINE)
    assert "order decides" in out


@pytest.mark.slow
def test_learning_again_asks_no_engine(run: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose revisions are there, and whose training was lost."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    again = workplace / "runs" / "again"
    shutil.copytree(run / "constitution", again, ignore=shutil.ignore_patterns("model", "logs", "report.md"))
    record = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    alone = {name: TREE[name] for name in (*EXACT, "model", "engine", "constitution")}
    write_config(workplace / "again.yaml", {"output_dir": "runs/again", **alone})
    assert main(["train", "again.yaml", "--resume"]) == 0
    assert not (again / "logs" / "engine.log").exists()
    assert_same_weights(again, run / "constitution")
    assert untimed(again) == untimed(run / "constitution")
    assert (again / "report.md").read_text() == (run / "constitution" / "report.md").read_text()
