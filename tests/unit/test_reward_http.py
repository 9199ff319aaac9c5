"""Rewards over HTTP: the reference server, and servers that fail in every way."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from aiohttp import ClientSession, web
from pydantic import SecretStr

from rlhf_ray.config.schema import HttpReward
from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards import failures
from rlhf_ray.rewards.failures import GuardedSource, Outcome
from rlhf_ray.rewards.remote import HttpSource
from rlhf_ray.rewards.server import TOKEN_VARIABLE
from tests.reward_servers import TOKEN, answering, http_section, reference_server, running
from tests.samples import samples_of


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "FIRST_WAIT", 0.01)


def ask(section: HttpReward, *texts: str, token: str | None = TOKEN, **columns: list[object]) -> Outcome:
    source = HttpSource(section, None if token is None else SecretStr(token))
    guarded = GuardedSource(section, source, section.batch_size)
    return asyncio.run(guarded.score(samples_of(*texts, **columns)))


def counting(answer: object) -> tuple[web.Application, list[dict[str, object]]]:
    """A server that says the same to everyone, or asks a function; and what it was sent."""
    seen: list[dict[str, object]] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        seen.append(body)
        found = answer(body) if callable(answer) else answer
        return found if isinstance(found, web.Response) else web.json_response(found)

    return answering(handle), seen


def test_what_the_function_says_arrives_in_order() -> None:
    """Five answers in batches of two; nothing to say about long ones."""
    with running(reference_server("tests.fakes:only_short")) as url:
        outcome = ask(http_section(url, batch_size=2), "a", "long one", "abc", "longer", "b")
    np.testing.assert_array_equal(outcome.values.rewards, np.float32([1, np.nan, 1, np.nan, 1]))
    assert not outcome.failed.any()
    assert outcome.num_retries == 0


def test_the_request_is_as_documented() -> None:
    app, seen = counting({"rewards": [0.5, None]})
    with running(app) as url:
        ask(http_section(url), "a", "b", answer=["x", None])
    assert seen == [
        {
            "prompts": [[{"role": "user", "content": f"question {n}"}] for n in (0, 1)],
            "completions": ["a", "b"],
            "columns": {"answer": ["x", None]},
        }
    ]


def test_columns_reach_an_async_function() -> None:
    with running(reference_server("tests.fakes:answer_is_right")) as url:
        assert ask(http_section(url), "ok", "no", answer=["ok", "yes"]).values.rewards.tolist() == [1.0, 0.0]


def test_two_failures_and_then_an_answer() -> None:
    answers = iter([web.Response(status=503), web.Response(text="<html>"), {"rewards": [2.0]}])
    app, seen = counting(lambda body: next(answers))
    with running(app) as url:
        outcome = ask(http_section(url), "a")
    assert (outcome.values.rewards.tolist(), outcome.num_retries, len(seen)) == ([2.0], 2, 3)


def test_retries_end() -> None:
    app, seen = counting(lambda body: web.Response(status=500, text="out of memory"))
    with running(app) as url, pytest.raises(RewardError, match="answered 500: out of memory"):
        ask(http_section(url, max_retries=2), "a")
    assert len(seen) == 3


def test_raise_asks_once() -> None:
    app, seen = counting(lambda body: web.Response(status=500))
    with running(app) as url, pytest.raises(RewardError):
        ask(http_section(url, on_error="raise"), "a")
    assert len(seen) == 1


def test_mask_leaves_out_the_batch_that_failed() -> None:
    def answer(body: dict[str, list[str]]) -> object:
        if "bad" in body["completions"]:
            return web.Response(status=500)
        return {"rewards": [float(len(text)) for text in body["completions"]]}

    app, seen = counting(answer)
    with running(app) as url:
        section = http_section(url, batch_size=2, max_retries=1, on_error="mask")
        outcome = ask(section, "a", "bb", "bad", "c", "dddd")
    np.testing.assert_array_equal(outcome.values.rewards, np.float32([1, 2, np.nan, np.nan, 4]))
    assert outcome.failed.tolist() == [False, False, True, True, False]
    assert (outcome.num_retries, len(seen)) == (1, 4)


def test_a_slow_server_is_given_up() -> None:
    async def sleep(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.json_response({})

    with running(answering(sleep)) as url, pytest.raises(RewardError) as raised:
        ask(http_section(url, timeout=0.2, max_retries=0), "a")
    assert str(raised.value) == f"reward 'served': the server at {url} did not answer within timeout=0.2 s"


def test_nobody_there() -> None:
    with running(answering(_never)) as url:
        pass
    with pytest.raises(RewardError, match="cannot be asked"):
        ask(http_section(url, max_retries=1), "a")


async def _never(request: web.Request) -> web.StreamResponse:
    raise AssertionError


@pytest.mark.parametrize("token", ["wrong-secret", None])
def test_a_wrong_token_is_said_at_once_and_not_repeated(token: str | None) -> None:
    with running(reference_server("tests.fakes:num_vowels")) as url, pytest.raises(ConfigError) as raised:
        ask(http_section(url, on_error="mask"), "a", token=token)
    assert "answers 401: it wants a token" in str(raised.value)
    assert "wrong-secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], 'without a list "rewards"'),
        ({"reward": [1.0]}, 'without a list "rewards"'),
        ({"rewards": [1.0, 2.0]}, "returned 2 values for 1 completions"),
        ({"rewards": ["1.0"]}, "neither a number nor null"),
        ({"rewards": [True]}, "neither a number nor null"),
        ({"rewards": [[1.0]]}, r"returned \[1.0\], not a number"),
        ({"rewards": [float("nan")]}, "returned nan"),
        (web.Response(status=307, headers={"Location": "http://elsewhere/"}), "answered 307"),
    ],
)
def test_unusable_answers(answer: object, message: str) -> None:
    app, _ = counting(lambda body: answer)
    with running(app) as url, pytest.raises(RewardError, match=message):
        ask(http_section(url, on_error="raise"), "a")


@pytest.mark.parametrize("limit", [1, 3])
def test_so_many_requests_at_a_time(limit: int) -> None:
    active, most = 0, 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal active, most
        active += 1
        most = max(most, active)
        await asyncio.sleep(0.05)
        active -= 1
        return web.json_response({"rewards": [0.0]})

    with running(answering(handle)) as url:
        ask(http_section(url, batch_size=1, max_concurrency=limit), *"abcdef")
    assert most == limit


def test_waits_double_and_jitter() -> None:
    for attempt, longest in ((0, 0.01), (1, 0.02), (3, 0.08), (30, failures.LONGEST_WAIT)):
        waits = [failures.wait_before_retry(attempt) for _ in range(200)]
        assert longest / 2 <= min(waits) < 0.6 * longest < 0.9 * longest < max(waits) <= longest


@pytest.fixture
def command() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_ray.rewards.server", "tests.fakes:num_vowels", "--port", "0"],
        env={**os.environ, TOKEN_VARIABLE: TOKEN},
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.wait()


def test_the_server_as_a_command(command: subprocess.Popen[str]) -> None:
    assert command.stdout is not None
    line = command.stdout.readline()
    assert line.startswith("serving tests.fakes:num_vowels at http://127.0.0.1:")
    url = line.split()[-1]
    assert ask(http_section(url), "audio", "xyz").values.rewards.tolist() == [4.0, 0.0]


def test_the_server_wants_a_token() -> None:
    environment = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
    module = [sys.executable, "-m", "rlhf_ray.rewards.server"]
    refused = subprocess.run([*module, "tests.fakes:num_vowels"], env=environment, capture_output=True)
    assert refused.returncode == 2
    assert b"RLHF_RAY_REWARD_TOKEN is not set" in refused.stderr


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "no object"),
        ({"prompts": [[]], "completions": "a"}, "must be lists"),
        ({"prompts": [[]], "completions": ["a", "b"]}, "the same length"),
        ({"prompts": ["hi"], "completions": ["a"]}, "a list of turns"),
        ({"prompts": [[]], "completions": ["a"], "columns": {"answer": ["a", "b"]}}, "the same length"),
    ],
)
def test_the_server_refuses_other_requests(body: object, message: str) -> None:
    async def post(url: str) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with ClientSession() as session, session.post(url, json=body, headers=headers) as response:
            return response.status, (await response.json())["error"]

    with running(reference_server("tests.fakes:num_vowels")) as url:
        status, error = asyncio.run(post(url))
    assert status == 400
    assert message in error


def test_a_function_that_raises_is_a_failure_of_the_server() -> None:
    with running(reference_server("tests.fakes:raises")) as url, pytest.raises(RewardError, match="KeyError"):
        ask(http_section(url, on_error="raise"), "a")
