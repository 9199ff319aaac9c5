"""The section `preference`, and pipelines in which a stage runs again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_ray.config.checks import load_checked
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.schema import PreferenceSection, turn_names
from rlhf_ray.errors import ConfigError

Tree = dict[str, object]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Online DPO without a mistake; the model, a hub name, is not looked at."""
    monkeypatch.chdir(tmp_path)
    for name, row in (
        ("prompts", {"prompt": "Why?"}),
        ("pairs", {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}),
        ("answers", {"prompt": "Why?", "completion": "Because.", "label": True}),
    ):
        Path(f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return {
        "output_dir": "runs/x",
        "model": {"path": "somebody/some-model"},
        "pipeline": ["preferences", "preference", "preferences", "preference"],
        "preferences": {"dataset": {"path": "prompts.jsonl"}},
        "preference": {},
    }


def mistakes(tree: Tree, *overrides: str) -> list[str]:
    try:
        load_checked(tree, overrides)
    except ConfigError as error:
        return [mistake.removeprefix("override ") for mistake in error.mistakes]
    return []


def test_turns_have_names_of_their_own() -> None:
    assert turn_names(["sft", "preferences", "preference", "preferences", "preference", "preferences"]) == (
        "sft",
        "preferences",
        "preference",
        "preferences-2",
        "preference-2",
        "preferences-3",
    )


def test_a_stage_may_run_again(tree: Tree) -> None:
    assert mistakes(tree) == []
    assert load_config(tree).stages == ("preferences", "preference", "preferences", "preference")


@pytest.mark.parametrize(
    ("algorithm", "beta"), [("dpo", 0.1), ("ipo", 0.1), ("orpo", 0.1), ("simpo", 2.0), ("kto", 0.1)]
)
def test_beta_is_the_algorithms_unless_it_is_written(algorithm: str, beta: float) -> None:
    assert PreferenceSection.model_validate({"algorithm": algorithm}).effective_beta == beta
    assert PreferenceSection.model_validate({"algorithm": algorithm, "beta": 0.7}).effective_beta == 0.7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["preference.algorithm=dppo"],
            "preference.algorithm=dppo: must be dpo, ipo, hinge, orpo, simpo or kto; did you mean dpo?",
        ),
        (
            ["preference.algorithm=simpo", "preference.label_smoothing=0.1"],
            "preference.label_smoothing=0.1: simpo does not use it; remove it, or use algorithm "
            "dpo or ipo or hinge",
        ),
        (
            ["preference.simpo_gamma=0.5"],
            "preference.simpo_gamma=0.5: dpo does not use it; remove it, or use algorithm simpo",
        ),
        (
            ["preference.algorithm=orpo", "preference.reference={path: a/b}"],
            "preference.reference={path: a/b}: orpo does not use it; remove it, or use algorithm "
            "dpo or ipo or hinge or kto",
        ),
        (
            ["preference.label_smoothing=0.5"],
            "preference.label_smoothing=0.5: must be a number at least 0 and less than 0.5",
        ),
        (
            ["pipeline=[preference, preferences, preference]"],
            "preference.dataset: missing, and no preferences stage runs before; name a dataset of pairs",
        ),
        (
            ["preference.dataset.path=answers.jsonl"],
            "preference.dataset.path=answers.jsonl: has the columns 'prompt', 'completion', 'label'; pairs "
            "needs 'chosen' and 'rejected'; rename the columns or use another dataset",
        ),
        (["preference.dataset.path=pairs.jsonl", "preference.algorithm=kto"], ""),
        (["preference.dataset.path=answers.jsonl", "preference.algorithm=kto"], ""),
        (
            ["preference.dataset.path=prompts.jsonl", "preference.algorithm=kto"],
            "preference.dataset.path=prompts.jsonl: has the columns 'prompt'; labelled answers needs "
            "'prompt' and 'completion' and 'label', or 'chosen' and 'rejected'; rename the columns or use "
            "another dataset",
        ),
        (["pipeline=[preference]", "preference.dataset.path=pairs.jsonl"], "preferences: not in pipeline"),
    ],
)
def test_one_mistake(tree: Tree, overrides: list[str], message: str) -> None:
    assert mistakes(tree, *overrides) == ([message] if message else [])
