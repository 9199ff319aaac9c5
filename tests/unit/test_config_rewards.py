"""Mistakes in reward sources: in what is written, and in what it points at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_ray.config.checks import check_config
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.config.schema import HttpReward, JudgeReward
from rlhf_ray.errors import ConfigError
from tests.tiny import tiny_model_folder

Tree = dict[str, object]
GOLD = {"type": "function", "name": "gold", "function": "rlhf_ray.rewards.gold:friendliness"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_model_folder(tmp_path / "lm")
    row = {"prompt": "How many eggs?", "answer": "6"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def config(*rewards: Tree, dataset: Tree | None = None) -> Tree:
    online = {
        "num_steps": 1,
        "max_prompt_length": 128,
        "critic_init": "policy",
        "dataset": dataset or {"path": "prompts.jsonl"},
        "rewards": [*rewards, GOLD],
    }
    return {"output_dir": "runs/x", "model": {"path": "lm"}, "online": online}


def refused(*rewards: Tree) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_config(config(*rewards))
    return list(raised.value.mistakes)


def checked(*rewards: Tree, dataset: Tree | None = None) -> list[str]:
    return check_config(load_config(config(*rewards, dataset=dataset)))


JUDGE = {"type": "judge", "name": "judge"}
HTTP = {"type": "http", "name": "server", "url": "http://127.0.0.1:8001/"}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            {"type": "htp"},
            ".type=htp: must be ensemble, exact_match, format, function, http, judge, length, "
            "math, model, reasoning_gym or regex; did you mean http?",
        ),
        (
            {**HTTP, "url": "127.0.0.1:8001"},
            ".url=127.0.0.1:8001: must be http://host:port/path or https://…",
        ),
        (
            {**HTTP, "url": "http://h:port/"},
            ".url=http://h:port/: is no URL (Port could not be cast to integer value as 'port'); "
            "write http://host:port/path",
        ),
        (
            {**HTTP, "url": "http://me:hidden@host/"},
            ".url=***: holds a password, which run.json would show; use token_env instead",
        ),
        ({**HTTP, "token": "abc"}, ".token=***: unknown key; did you mean token_env?"),
        ({**HTTP, "on_error": "msk"}, ".on_error=msk: must be raise, retry or mask; did you mean mask?"),
        (
            {"type": "regex", "pattern": "(a"},
            ".pattern=(a: is no regular expression: missing ), unterminated subpattern at position 0",
        ),
        ({"type": "regex"}, ".pattern: give either pattern or column"),
        (
            {"type": "format", "pattern": "[a"},
            ".pattern=[a: is no regular expression: unterminated character set at position 0",
        ),
        (
            {"type": "math", "extract": "####.*"},
            ".extract=####.*: must have exactly one group, around the answer; write others as (?:…)",
        ),
        (
            {"type": "exact_match", "extract": "(a)(b)"},
            ".extract=(a)(b): must have exactly one group, around the answer; write others as (?:…)",
        ),
        ({"type": "length"}, ".max_tokens: give either max_tokens or target"),
        ({"type": "length", "target": 5, "buffer": 2}, ".buffer=2: belongs to max_tokens; remove it"),
        ({"type": "ensemble", "paths": ["a"]}, '.paths=["a"]: needs at least two reward models'),
        ({**JUDGE, "options": {"Yes": 1}}, ".options: needs at least two replies with different values"),
        ({**JUDGE, "options": {"Yes": 1, "": 0}}, ".options: a reply is empty; give every option some text"),
        (
            {"type": "reasoning_gym", "threshold": 0},
            ".threshold=0: must be a number greater than 0 and at most 1 or null",
        ),
    ],
)
def test_what_is_written_wrongly(folder: Path, reward: Tree, message: str) -> None:
    assert refused(reward) == [f"online.rewards.0{message}"]


def test_judges_share_a_model(folder: Path) -> None:
    other = {**JUDGE, "name": "other", "path": "lm"}
    assert refused(JUDGE, other) == [
        "online.rewards: all judges share one engine; give them the same path and chat_template"
    ]


def test_names_differ(folder: Path) -> None:
    assert refused({"type": "math"}, {"type": "math"}) == [
        "online.rewards: names must differ, these do not: math, math, gold"
    ]


def test_options_of_a_judge_replace_the_default(folder: Path) -> None:
    found = load_config(config({**JUDGE, "options": {"good": 2, "bad": -1}}))
    assert found.online is not None
    judge = found.online.rewards[0]
    assert isinstance(judge, JudgeReward)
    assert judge.options == {"good": 2.0, "bad": -1.0}


def test_a_servers_failures_are_retried_by_default(folder: Path) -> None:
    found = load_config(config(HTTP))
    assert found.online is not None
    server = found.online.rewards[0]
    assert isinstance(server, HttpReward)
    assert (server.on_error, server.max_retries) == ("retry", 3)


def test_a_token_is_named_and_never_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "hush-hush")
    found = load_config(config({**HTTP, "token_env": "MY_TOKEN"}))
    assert check_config(found) == []
    written = json.dumps(dump_config(found))
    assert "MY_TOKEN" in written
    assert "hush" not in written


GYM: Tree = {"path": "reasoning_gym:chain_sum"}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            {**HTTP, "token_env": "NO_SUCH_VARIABLE"},
            ".token_env=NO_SUCH_VARIABLE: the environment variable is not set; export it with the "
            "server's token",
        ),
        (
            {"type": "math", "column": "anwser"},
            ".column=anwser: the dataset of prompts has no such column; did you mean answer?",
        ),
        (
            {"type": "exact_match", "column": "x"},
            ".column=x: the dataset of prompts has no such column; it has answer",
        ),
        (
            {"type": "regex", "column": "x"},
            ".column=x: the dataset of prompts has no such column; it has answer",
        ),
        (
            {"type": "reasoning_gym"},
            ": scores answers to questions of reasoning_gym only; use a dataset with path: "
            "reasoning_gym:TASK, or another reward",
        ),
        (
            {**JUDGE, "template": "judge.txt"},
            ".template=judge.txt: is neither text with {completion} in it nor a file that can be read",
        ),
        (
            {**JUDGE, "template": "bare.txt"},
            ".template=bare.txt: the file has no {completion}, where the answer is to stand",
        ),
        ({**JUDGE, "chat_template": "no.jinja"}, ".chat_template=no.jinja: no such file"),
        (
            {"type": "ensemble", "paths": ["rm", "lm"]},
            ".paths.1=lm: is a language model, and a reward model is wanted; name the folder of a "
            "trained one",
        ),
        (
            {"type": "function", "name": "f", "function": "no_such_module:f", "timeout": 5},
            ".function=no_such_module:f: cannot import no_such_module (No module named 'no_such_module')",
        ),
    ],
)
def test_what_points_nowhere(folder: Path, reward: Tree, message: str) -> None:
    (folder / "bare.txt").write_text("Is it good?")
    reward_model = tiny_model_folder(folder / "rm")
    written = json.loads((reward_model / "config.json").read_text())
    written["architectures"] = ["LlamaForSequenceClassification"]
    (reward_model / "config.json").write_text(json.dumps(written))
    assert checked(reward) == [f"online.rewards.0{message}"]


def test_a_dataset_of_reasoning_gym(folder: Path) -> None:
    assert checked({"type": "reasoning_gym"}, {"type": "math"}, dataset=GYM) == []
    assert checked(dataset={"path": "reasoning_gym:chain_sun"}) == [
        "online.dataset.path=reasoning_gym:chain_sun: reasoning_gym has no such task; "
        "did you mean reasoning_gym:chain_sum?"
    ]
    assert checked(dataset={**GYM, "options": {"min_terms": "two"}}) == [
        "online.dataset.options: chain_sum refuses them: "
        "'>' not supported between instances of 'str' and 'int'"
    ]


def test_files_and_inline_templates_are_both_right(folder: Path) -> None:
    (folder / "judge.txt").write_text("{prompt}\n{completion}\nGood?")
    assert checked({**JUDGE, "template": "judge.txt"}) == []
    assert checked({**JUDGE, "template": "{completion}: good?"}) == []
