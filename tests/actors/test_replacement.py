"""Actors that die and are replaced: what was lost with them is asked again, once, and nobody notices."""

from __future__ import annotations

import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.actor import ActorHandle

from actors.calls import Turns
from actors.group import ActorGroup, Timeline
from actors.host import AsyncHost, Host
from actors.pulse import Pulse
from rlhf_ray.errors import RewardError, RlhfRayError, WorkerLost

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_cluster")]

WORKER = "tests.actors.workers:Worker"


class Counted:
    """Fields: limit: losses of one actor that are borne."""

    def __init__(self, limit: int = 10) -> None:
        self.limit = limit
        self.losses: Counter[str] = Counter()
        self.returns: Counter[str] = Counter()

    def lost(self, name: str, failure: RlhfRayError) -> None:
        if self.losses[name] == self.limit:
            raise failure
        self.losses[name] += 1

    def returned(self, name: str) -> None:
        self.returns[name] += 1


class Stage:
    def __init__(
        self,
        logs: Path,
        turns: bool = False,
        limit: int = 10,
        timeout: float = 60.0,
        silence: float = math.inf,
    ) -> None:
        self.logs = logs
        self.turns = Turns(turns)
        self.losses = Counted(limit)
        self.timeline = Timeline(self.losses, Pulse(silence))
        self.timeout = timeout
        self.groups: list[ActorGroup] = []

    def group(
        self,
        name: str,
        count: int = 1,
        host: type[Host] = Host,
        is_pure: bool = True,
        needs_weights: bool = False,
    ) -> ActorGroup:
        def start(rank: int) -> ActorHandle:
            log = self.logs / f"{name}-{rank}.log"
            handle = ray.remote(host).options(num_cpus=0).remote(name, str(log))
            assert isinstance(handle, ActorHandle)
            return handle

        handles = [start(rank) for rank in range(count)]
        group = ActorGroup(name, handles, self.turns, self.timeline, self.timeout, start)
        kwargs: list[dict[str, object]] = [{"rank": rank} for rank in range(count)]
        group.build(WORKER, kwargs, 60.0, is_pure=is_pure, needs_weights=needs_weights)
        group.wait_until_built()
        self.groups.append(group)
        return group


@pytest.fixture
def make_stage(tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    stages: list[Stage] = []

    def make(**options: object) -> Stage:
        stages.append(Stage(tmp_path / "logs", **options))  # type: ignore[arg-type]
        return stages[-1]

    yield make
    for stage in stages:
        for group in stage.groups:
            group.kill()


def pid(group: ActorGroup, rank: int = 0) -> int:
    found = group.call_rank(rank, "who").result()
    assert isinstance(found, tuple)
    return int(found[1])


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("turns", [False, True])
def test_a_chain_of_calls_survives_its_middle(make_stage: Callable[..., Stage], turns: bool) -> None:
    """engine -> reward -> policy, whose two ranks keep count: each call runs exactly once there."""
    stage = make_stage(turns=turns)
    engine, reward = stage.group("engine"), stage.group("reward")
    policy = stage.group("policy", 2, is_pure=False)
    victim = pid(reward)
    answer = engine.call("tagged", 5)
    slow = reward.call("later", 1.0, answer)
    trained = policy.call("remember", slow)
    after = policy.call("add", slow, 1)
    time.sleep(0.5)  # the reward is at it
    kill(victim)
    assert after.result() == 6
    trained.result()
    heard = [each.result() for each in policy.call_each("remembered", [(), ()])]
    assert heard == [[5], [5]]
    assert stage.losses.losses == {"reward": 1}
    assert stage.losses.returns == {"reward": 1}
    assert reward.num_starts == [2] and engine.num_starts == [1]
    assert pid(reward) != victim


def test_another_engine_stands_in_while_the_new_one_waits_for_weights(
    make_stage: Callable[..., Stage],
) -> None:
    stage = make_stage()
    engines = stage.group("engine", 2, host=AsyncHost, needs_weights=True)
    engines.note_weights(engines.handles)
    before = [each.result() for each in engines.call_each("who_async", [(), ()])]
    assert [rank for rank, _ in before] == [0, 1]
    naps = engines.call_each("nap", [(1.0,), (1.0,)])
    time.sleep(0.3)
    kill(before[0][1])
    assert [nap.result() for nap in naps] == [1.0, 1.0]
    assert engines.in_service == [1]
    # Stale: what is meant for the first is done by the second.
    engines.wait_until_built()
    assert [each.result()[0] for each in engines.call_each("who_async", [(), ()])] == [1, 1]
    assert stage.losses.returns == {}
    engines.note_weights(engines.handles)
    assert [each.result()[0] for each in engines.call_each("who_async", [(), ()])] == [0, 1]
    assert stage.losses.returns == {"engine[0]": 1}


def test_calls_wait_for_the_weights_of_the_only_engine(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage(turns=True)
    engine = stage.group("engine", needs_weights=True)
    policy = stage.group("policy", is_pure=False)
    published: list[int] = []

    def publish() -> None:
        engine.wait_until_built()
        policy.call("remember", "published").result()
        published.append(len(engine.gpus()))
        engine.note_weights(engine.handles)

    engine.refresh = publish
    engine.note_weights(engine.handles)
    victim = pid(engine)
    answer = engine.call("later", 1.0, 4)
    trained = policy.call("remember", answer)
    time.sleep(0.3)
    kill(victim)
    trained.result()
    assert policy.call("remembered").result() == ["published", 4], "weights first"
    assert len(published) == 1


def test_weights_that_follow_soon_are_not_sent_twice(make_stage: Callable[..., Stage]) -> None:
    """Who is about to publish waits for what engines are at; the rest begins with the new weights."""
    stage = make_stage()
    engine = stage.group("engine", needs_weights=True)
    engine.refresh = lambda: pytest.fail("the old weights are of no use")
    engine.note_weights(engine.handles)
    victim = pid(engine)
    answer = engine.call("later", 0.5, 4)
    time.sleep(0.2)
    kill(victim)
    stage.timeline.open.wait_for_sent(answer.tasks, 30.0)
    assert not answer.tasks[0].is_sent
    engine.wait_until_built()
    engine.note_weights(engine.handles)
    assert answer.result() == 4


def test_an_idle_death_is_made_up_for_by_the_next_call(make_stage: Callable[..., Stage]) -> None:
    reference = make_stage().group("reference")
    kill(pid(reference))
    time.sleep(1.0)
    assert reference.call("add", 1, 2).result() == 3


def test_a_call_that_does_not_end_is_asked_of_a_new_process(make_stage: Callable[..., Stage]) -> None:
    """The first process that is asked hangs, the next does not."""
    stage = make_stage(timeout=3.0)
    reward = stage.group("reward")
    start = time.monotonic()
    assert reward.call("hang_once", str(stage.logs / "hung")).result() == "answered"
    assert 3.0 < time.monotonic() - start < 20.0
    assert stage.losses.losses == {"reward": 1}


def test_too_many_deaths_are_a_failure(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage(limit=2)
    reward = stage.group("reward")
    with pytest.raises(WorkerLost, match=r"^reward\.die failed: its process died"):
        reward.call("die").result()
    assert stage.losses.losses == {"reward": 2}


def test_who_remembers_is_not_replaced(make_stage: Callable[..., Stage]) -> None:
    policy = make_stage().group("policy", 2, is_pure=False)
    with pytest.raises(WorkerLost, match=r"^policy\[1\]\.lose_peer failed: its process died"):
        policy.call("lose_peer").result()


def test_what_a_worker_raises_is_not_asked_again(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage()
    with pytest.raises(RewardError):
        stage.group("reward").call("fail", "RewardError").result()
    assert not stage.losses.losses


def test_what_nobody_wants_is_not_asked_again(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage()
    engines = stage.group("engine", 2, host=AsyncHost, needs_weights=True)
    engines.note_weights(engines.handles)
    _, victim = engines.call_rank(0, "who_async").result()  # type: ignore[misc]
    unwanted, wanted = engines.call_rank(0, "nap", 30.0), engines.call_rank(0, "nap", 0.6)
    unwanted.tasks[0].is_wanted = False
    time.sleep(0.2)
    kill(victim)
    assert wanted.result() == 0.6
    assert (wanted.tasks[0].rank, wanted.tasks[0].at) == (0, 1)
    assert not stage.timeline.open.is_open(unwanted.tasks[0])


@pytest.mark.slow
def test_a_process_that_stands_still_is_missed(make_stage: Callable[..., Stage]) -> None:
    """It is stopped, not dead: Ray takes it for alive, and its call could run for an hour."""
    stage = make_stage(silence=5.0)
    engine, policy = stage.group("engine"), stage.group("policy", is_pure=False)
    victim = pid(engine)
    policy.call("sleep", 12.0)  # works on, and is heard
    answer = engine.call("later", 0.5, 7)
    start = time.monotonic()
    os.kill(victim, signal.SIGSTOP)
    assert answer.result() == 7
    assert 5.0 < time.monotonic() - start < 25.0
    assert stage.losses.losses == {"engine": 1}
    assert pid(engine) != victim
    os.kill(pid(policy), signal.SIGSTOP)
    with pytest.raises(WorkerLost, match=r"^policy: no sign of life for \d+ s$"):
        policy.call("add", 1).result()
