"""Rewards in a process of their own: the same numbers, and an end to those that never answer."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import psutil
import pytest

from rlhf_ray.config.schema import MathReward, RegexReward
from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards.child import ChildFunction
from rlhf_ray.rewards.failures import GuardedSource
from tests.samples import samples_of


def ask(child: ChildFunction, *texts: str, **columns: list[object]) -> np.ndarray:
    return asyncio.run(child.score(samples_of(*texts, **columns))).rewards


def process(child: ChildFunction) -> psutil.Process:
    assert child._child is not None
    return psutil.Process(child._child.process.pid)


def test_a_function_answers_as_it_would_here() -> None:
    child = ChildFunction("mine", "tests.slow_rewards:chatty", timeout=20)
    np.testing.assert_array_equal(ask(child, "a", "bbb"), np.float32([1, np.nan]))
    first = process(child)
    assert ask(child, "aa").tolist() == [2.0]
    assert process(child) == first
    child.close()
    assert not first.is_running()


def test_a_hung_function_is_killed_with_what_it_started_and_the_next_batch_is_answered(
    capfd: pytest.CaptureFixture[str],
) -> None:
    child = ChildFunction("mine", "tests.slow_rewards:sleeps_when_asked", timeout=1)
    assert ask(child, "a").tolist() == [1.0]
    hung = process(child)
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"reward 'mine' did not answer within timeout=1 s and was killed"):
        ask(child, "sleep")
    assert time.monotonic() - start < 4
    assert not hung.is_running()
    assert not [p for p in psutil.process_iter(["cmdline"]) if "86399" in (p.info["cmdline"] or [])]
    assert "sleeps_when_asked" in capfd.readouterr().err  # where it was
    assert ask(child, "a").tolist() == [1.0]
    child.close()


def test_an_answer_that_is_never_judged_fails_alone() -> None:
    """A pattern that backtracks for ever holds Python's lock: no thread and no signal handler of that process
    could stop it."""
    section = RegexReward(type="regex", pattern="(a+)+$", timeout=1)
    child = ChildFunction("regex", section, timeout=1)
    hung = "a" * 60 + "b"
    values = asyncio.run(child.score(samples_of("aaa", hung, "b", hung, "a")))
    np.testing.assert_array_equal(values.rewards, np.float32([1, np.nan, 0, np.nan, 1]))
    reason = (
        "did not answer within timeout=1 s and was killed; the log of the reward actor shows where it was"
    )
    assert values.failures == {1: reason, 3: reason}
    assert ask(child, "aaa").tolist() == [1.0]
    child.close()


@pytest.mark.parametrize("on_error", ["mask", "raise"])
def test_the_policy_decides_about_an_answer_that_is_never_judged(on_error: str) -> None:
    keys = {"type": "regex", "pattern": "(a+)+$", "timeout": 1, "on_error": on_error}
    section = RegexReward.model_validate(keys)
    child = ChildFunction("regex", section, timeout=1)
    guarded = GuardedSource(section, child)
    samples = samples_of("aaa", "a" * 60 + "b", "b")
    if on_error == "mask":
        outcome = asyncio.run(guarded.score(samples))
        assert outcome.failed.tolist() == [False, True, False]
        np.testing.assert_array_equal(outcome.values.rewards, np.float32([1, np.nan, 0]))
        assert outcome.num_retries == 0, "it would hang again"
    else:
        with pytest.raises(RewardError, match="reward 'regex': prompt 1: did not answer within timeout=1 s"):
            asyncio.run(guarded.score(samples))
    child.close()


def test_an_answer_that_a_verifier_raises_on_fails_alone() -> None:
    """A pattern a row, of which one is none."""
    child = ChildFunction("regex", RegexReward(type="regex", column="wanted"), timeout=20)
    values = asyncio.run(child.score(samples_of("egg", "egg", "egg", wanted=["egg", "(", "^g"])))
    np.testing.assert_array_equal(values.rewards, np.float32([1, np.nan, 0]))
    assert list(values.failures) == [1] and values.failures[1].startswith("raised ")
    child.close()


def test_a_process_that_dies_is_reported_and_replaced() -> None:
    child = ChildFunction("mine", "tests.slow_rewards:dies_when_asked", timeout=20)
    with pytest.raises(RewardError, match="reward 'mine': its process died with exit code 3"):
        ask(child, "die")
    assert ask(child, "a").tolist() == [0.0]
    child.close()


def test_what_it_raises_is_a_failure_with_its_name() -> None:
    child = ChildFunction("mine", "tests.slow_rewards:refuses", timeout=20)
    with pytest.raises(RewardError, match="reward 'mine' raised ValueError: no"):
        ask(child, "a")
    child.close()


@pytest.mark.parametrize(
    ("function", "message"),
    [("no_such_module:f", "cannot import no_such_module"), ("tests.slow_rewards:no", "has no function no")],
)
def test_a_function_that_is_not_there(function: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ask(ChildFunction("mine", function, timeout=20), "a")


def test_a_verifier_keeps_its_own_limit_an_answer() -> None:
    """math-verify's timeouts are signals, which only a main thread may set: the child has one to give."""
    found: list[np.ndarray] = []
    child = ChildFunction("math", MathReward(type="math"), timeout=60)
    thread = threading.Thread(target=lambda: found.append(ask(child, "0.5", "2", answer=["1/2", "1/2"])))
    thread.start()
    thread.join()
    assert found[0].tolist() == [1.0, 0.0]
    child.close()
