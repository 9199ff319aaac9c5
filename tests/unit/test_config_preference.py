"""The section `preference`, and pipelines in which a stage runs again."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event

import pytest

from launch.artefacts import Artefacts
from launch.cli import main
from launch.stages.context import StageContext
from rlhf_ray.config.checks import load_checked
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.schema import PreferenceSection, turn_names
from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.progress import QuietProgress
from rlhf_ray.reporting.run_folder import RunFolder

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


def test_a_rule_that_reads_what_is_wrong_waits(tree: Tree) -> None:
    """Others are tried; nothing is said of a part as if it were right."""
    wrong = ["preference.algorithm=simpo", "preference.reference.path=3", "seed=x"]
    assert mistakes(tree, *wrong, "preference.label_smoothing=0.1") == [
        "preference.reference.path=3: must be text, not a number",
        "seed=x: must be a whole number at least 0, not text",
    ]
    assert "preferences: not in pipeline" in mistakes(
        tree, "preferences.dataset.path=3", "pipeline=[preference]"
    )


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


def test_check_says_what_each_turn_starts_from(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.yaml").write_text(json.dumps(tree))
    assert main(["check", "my.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "OK: 4 stages: preferences, preference, preferences-2, preference-2"
    assert lines[2].startswith("  preference    model somebody/some-model; pairs that preferences collects; ")
    assert lines[3].startswith("  preferences-2 model that preference makes; prompts.jsonl (1 row); ")


def test_turns_have_seeds_of_their_own(tree: Tree) -> None:
    config = load_config(tree, ["seed=7"])

    def seed(turn: int) -> int:
        folder, progress = RunFolder("runs/x"), QuietProgress()
        return StageContext(config, "x", turn, Artefacts.at_start(config), folder, progress, Event()).seed

    assert seed(1) == 7
    assert len({seed(turn) for turn in range(1, 9)}) == 8


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


ONLY = "which only dpo and ipo and hinge can use; use one of them"


@pytest.mark.parametrize("algorithm", ["orpo", "simpo", "kto"])
def test_soft_labels_of_a_file_need_an_algorithm_that_takes_them(tree: Tree, algorithm: str) -> None:
    pairs = [
        {"prompt": "Why?", "chosen": f"Because {label}.", "rejected": "No.", "soft_label": label}
        for label in (1.0, 0.9)
    ]
    Path("soft.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    own = "preference.dataset.path=soft.jsonl"
    (said,) = mistakes(tree, own, f"preference.algorithm={algorithm}")
    assert said == (
        f"preference.algorithm={algorithm}: soft.jsonl has rows with a soft_label below 1, {ONLY}, or remove "
        "the column"
    )
    assert mistakes(tree, own, "preference.algorithm=ipo") == []
    Path("soft.jsonl").write_text(json.dumps(pairs[0]) + "\n")
    assert mistakes(tree, own, f"preference.algorithm={algorithm}") == [], "1 is what a plain choice has"


def test_kto_reads_single_answers_which_have_no_soft_label(tree: Tree) -> None:
    row = {"prompt": "Why?", "completion": "Because.", "label": True, "soft_label": 0.8}
    Path("answers.jsonl").write_text(json.dumps(row) + "\n")
    assert mistakes(tree, "preference.dataset.path=answers.jsonl", "preference.algorithm=kto") == []


@pytest.mark.parametrize(
    ("annotator", "has_them", "remedy"),
    [
        ("{type: constitution, name: ai}", "annotator ai gives soft labels", "leave it out"),
        (
            "{type: file, name: people, dataset: {path: soft.jsonl}}",
            "annotator people: soft.jsonl has rows with a soft_label below 1",
            "remove the column",
        ),
    ],
)
def test_soft_labels_of_an_annotator(tree: Tree, annotator: str, has_them: str, remedy: str) -> None:
    row = {"prompt": "Why?", "chosen": "Because.", "rejected": "No.", "soft_label": 0.7}
    Path("soft.jsonl").write_text(json.dumps(row) + "\n")
    own = f"preferences.annotators=[{{type: simulated, name: votes}}, {annotator}]"
    (said,) = mistakes(tree, own, "preference.algorithm=simpo")
    assert said == f"preference.algorithm=simpo: {has_them}, {ONLY}, or {remedy}"
    assert mistakes(tree, own, "preference.algorithm=dpo") == []
    elsewhere = "preference.dataset.path=pairs.jsonl"
    assert mistakes(tree, own, elsewhere, "preference.algorithm=simpo") == []
