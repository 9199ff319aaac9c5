"""What `check` says of a constitution stage and of feedback models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.test_config_checks import Tree, mistakes, model_folder, rows

FEEDBACK = {"type": "constitution", "name": "ai"}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Constitutional AI without a mistake."""
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "lm")
    model_folder(tmp_path / "rm", "LlamaForSequenceClassification")
    prompts = rows(tmp_path / "prompts.jsonl", "prompt")
    examples = rows(tmp_path / "sft.jsonl", "prompt", "completion")
    return {
        "output_dir": "runs/x",
        "model": {"path": "lm"},
        "pipeline": ["constitution", "preferences", "reward"],
        "constitution": {
            "dataset": {"path": prompts},
            "helpful_dataset": {"path": examples},
            "eval_dataset": {"path": examples},
            "max_length": 128,
        },
        "preferences": {"dataset": {"path": prompts}, "annotators": [FEEDBACK]},
        "reward": {"max_length": 128},
    }


def test_a_right_configuration_has_no_mistakes(tree: Tree) -> None:
    assert mistakes(tree) == []
    Path("own.yaml").write_text("principles: [{id: a, critique: b, revision: c, choice: d, source: e}]\n")
    assert mistakes(tree, "constitution.principles=own.yaml") == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["constitution.principles=gone.yaml"],
            "constitution.principles=gone.yaml: no such file; name a YAML file, or embedded:constitution",
        ),
        (
            ["preferences.annotators.0.principles=broken.yaml"],
            "preferences.annotators.0.principles=broken.yaml: broken.yaml:1: principles=[]: missing; "
            "give a list of principles",
        ),
        (
            ["preferences.annotators.0.num_principles=12"],
            "preferences.annotators.0.num_principles=12: the constitution has 11; ask for fewer",
        ),
        (
            ["preferences.annotators.0.model={path: rm}"],
            "preferences.annotators.0.model.path=rm: is a reward model, and a language model is wanted",
        ),
        (
            ["constitution.helpful_dataset.path=prompts.jsonl"],
            "constitution.helpful_dataset.path=prompts.jsonl: has the columns 'prompt'; sft needs "
            "'messages', or 'prompt' and 'completion', or 'text'; rename the columns or use another dataset",
        ),
        (
            ["constitution.dataset.path=pompts.jsonl"],
            "constitution.dataset.path=pompts.jsonl: no such file; did you mean prompts.jsonl?",
        ),
        (
            ["constitution.max_length=1000"],
            "constitution.max_length=1000: texts may have 1000 tokens, and the model is made for 128; "
            "lower it",
        ),
        (
            ["constitution.max_completion_length=128"],
            "constitution.max_completion_length=128: answers may have 128 tokens, and the model is made for "
            "128; lower it",
        ),
        (
            ["placement.policy.count=4", "constitution.batch_size=3"],
            "placement.policy.count=4: more ranks than rows in constitution.batch_size=3",
        ),
        (
            ["preferences.dataset=null"],
            "preferences.dataset=null: missing; annotator ai judges answers to its prompts; name a dataset "
            "of prompts",
        ),
    ],
)
def test_one_mistake(tree: Tree, overrides: list[str], message: str) -> None:
    Path("broken.yaml").write_text("principles: []\n")
    assert mistakes(tree, *overrides) == [message]


def test_later_stages_start_from_the_model_of_the_constitution(tree: Tree) -> None:
    assert mistakes(tree, "model.path=./gone", "constitution.model.path=lm") == []
