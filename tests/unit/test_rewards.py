"""Reward functions by import path: what they may return, and what is refused."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards.functions import RewardFunction, import_function
from rlhf_ray.rewards.gold import friendliness
from rlhf_ray.types import Message

PROMPTS: list[tuple[Message, ...]] = [
    ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}),
    ({"role": "user", "content": "what now?"},),
]
COMPLETIONS = ["ok", "audio"]


def rewards(name: str, columns: list[dict[str, object]] | None = None) -> np.ndarray:
    function = RewardFunction("mine", f"tests.fakes:{name}")
    return function(PROMPTS, COMPLETIONS, columns or [{}, {}])


def test_plain_function() -> None:
    found = rewards("num_vowels")
    assert (found.tolist(), found.dtype) == ([1.0, 4.0], np.float32)


def test_prompts_are_conversations() -> None:
    assert rewards("last_user_turn").tolist() == [2.0, 9.0]


def test_async_function_gets_the_datasets_columns() -> None:
    columns: list[dict[str, object]] = [{"answer": "ok", "level": 1}, {"answer": "video", "level": 2}]
    function = RewardFunction("right", "tests.fakes:answer_is_right")
    with pytest.raises(RewardError, match=r"'right' raised TypeError.*level"):
        function(PROMPTS, COMPLETIONS, columns)
    assert function(PROMPTS, COMPLETIONS, [{"answer": "ok"}, {"answer": "video"}]).tolist() == [1.0, 0.0]


def test_a_function_may_run_an_event_loop_of_its_own() -> None:
    function = RewardFunction("mine", "tests.slow_rewards:has_its_own_loop")
    assert function(PROMPTS, COMPLETIONS, [{}, {}]).tolist() == [2.0, 5.0]
    assert asyncio.run(function.rewards(PROMPTS, COMPLETIONS, [{}, {}])).tolist() == [2.0, 5.0]


def test_none_says_nothing() -> None:
    found = rewards("only_short")
    assert found[0] == 1.0
    assert math.isnan(found[1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_too_few", "reward 'mine' returned 1 values for 2 completions"),
        ("a_single_number", "reward 'mine' returned float for 2 completions"),
        ("not_a_number", "reward 'mine' returned nan"),
        ("words", "reward 'mine' returned 'good', not a number or None"),
        ("raises", "reward 'mine' raised KeyError: 'gold'"),
    ],
)
def test_unusable_answers_name_the_reward(name: str, message: str) -> None:
    with pytest.raises(RewardError) as raised:
        rewards(name)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tests.fakes", "write it as module:name"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("tests.fakes:no_such_function", "tests.fakes has no function no_such_function"),
        ("tests.fakes:Prompts", None),
        ("tests.tiny:VOCABULARY", "tests.tiny has no function VOCABULARY"),
    ],
)
def test_import_paths(path: str, message: str | None) -> None:
    if message is None:
        assert callable(import_function(path))
        return
    with pytest.raises(ConfigError, match=f"function={path}: {message}"):
        import_function(path)


def test_friendliness_orders_answers() -> None:
    texts = ["You are wonderful, thank you!", "The train leaves at nine.", "I hate this awful thing.", "  "]
    scores = friendliness([[]] * 4, texts)
    assert scores[0] > 0.5 > scores[1] == 0.0 > scores[2] > scores[3] == -1.0
