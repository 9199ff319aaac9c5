"""Mistakes in `online.environment`, each in full."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.config.checks import load_checked
from rlhf_ray.config.loading import load_config
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.encoding import encode_prompts
from rlhf_ray.data.formats import prompt_examples
from rlhf_ray.data.loading import load_rows
from rlhf_ray.errors import ConfigError
from tests.tiny import tiny_tokenizer

CLASS = "rlhf_ray.environments.guessing:NumberGuessing"
ALGORITHMS = (
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "raft",
)


def mistakes(*overrides: str) -> list[str]:
    """Of the packaged configuration with these changes, without the place."""
    try:
        load_checked("guess", overrides)
    except ConfigError as error:
        return [mistake.partition(": ")[2] for mistake in error.mistakes]
    return []


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_packaged_configuration_is_right_with_any_algorithm() -> None:
    assert mistakes() == []
    for algorithm in ALGORITHMS:
        assert mistakes(f"online.algorithm={algorithm}") == []
    assert mistakes("online.algorithm=ppo", "online.critic_init=policy") == []


def test_defaults() -> None:
    config = load_config("guess", [f"online.environment={{class_path: '{CLASS}'}}"])
    assert config.online is not None and config.online.environment is not None
    assert config.online.environment.options == {}
    assert config.online.environment.max_turns == 4
    assert config.online.max_response_length == config.online.environment.max_episode_length == 512
    assert config.online.reward_names == ["environment"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("class_path=guessing", "write it as module:Class"),
        ("class_path=no_such:Game", "cannot import no_such (No module named 'no_such')"),
        ("class_path=json:Game", "json has no class Game"),
        ("class_path=json:dumps", "json has no class dumps"),
        ("class_path=json:JSONDecoder", "has no method reset and no step"),
        ("class_path=bad_environment:Game", "importing it raised ZeroDivisionError: division by zero"),
        ("max_turns=0", "must be a whole number greater than 0"),
        ("max_turn=3", "unknown key; did you mean max_turns?"),
    ],
)
def test_one_mistake(override: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("bad_environment.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(".")
    found = mistakes(f"online.environment.{override}")
    assert found == [message]


def test_an_answer_must_fit_into_an_episode() -> None:
    (found,) = mistakes("online.environment.max_episode_length=4")
    assert found == (
        "online.max_completion_length=8: one answer would not fit into environment.max_episode_length=4; "
        "lower it, or raise that"
    )


def test_options_are_those_of_the_class() -> None:
    (found,) = mistakes("online.environment.options.lo=3")
    assert found == (
        f"online.environment.options: {CLASS} does not take them: got an unexpected keyword argument 'lo'"
    )


def test_episodes_must_fit_into_the_model() -> None:
    (found,) = mistakes("online.environment.max_episode_length=8190")
    assert found == (
        "max_prompt_length + environment.max_episode_length are 8350 tokens, "
        "and the model is made for 8192; lower it"
    )


def test_without_an_environment_there_must_be_rewards() -> None:
    (found,) = mistakes("online.environment=null")
    assert found == "online.rewards=[]: must be a list with at least 1 entry"


def test_watched_rewards_are_enough_beside_an_environment() -> None:
    gold = "type: function, function: 'rlhf_ray.rewards.gold:friendliness', weight: 0"
    assert mistakes(f"online.rewards=[{{name: gold, {gold}}}]") == []
    (found,) = mistakes(f"online.rewards=[{{name: environment, {gold}}}]")
    assert found.endswith("names must differ, these do not: environment, environment")


def test_the_prompts_of_the_game() -> None:
    config = load_config("guess")
    assert config.online is not None and config.online.eval_dataset is not None
    formatter = ChatFormatter(tiny_tokenizer(), (2,))
    for section, count in ((config.online.dataset, 80), (config.online.eval_dataset, 20)):
        examples, skipped = prompt_examples(load_rows(section, seed=0))
        assert len(examples) == count and not len(skipped)
        secrets = [example.columns["secret"] for example in examples]
        assert sorted(set(secrets)) == list(range(1, 11))
        prompts, _ = encode_prompts(examples, formatter, max_prompt_length=1000)
        assert len(prompts) == count
        for example in examples:
            _check_shown_game([turn["content"] for turn in example.messages])


def _check_shown_game(turns: list[str]) -> None:
    """The hints of the game that the prompt shows are those of its last guess."""
    guesses = [int(text) for text in turns[1::2]]
    hints = turns[2:-1:2]
    assert hints == ["Higher." if guess < guesses[-1] else "Lower." for guess in guesses[:-1]]
    assert turns[-1] == f"Right. {turns[0]}"
