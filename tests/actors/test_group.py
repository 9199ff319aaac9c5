"""Groups of actors on a real Ray: fan out, first failure, deadlines, turns."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from actors.calls import Turns
from actors.group import ActorGroup, Timeline, union_seconds
from actors.host import AsyncHost, Host
from rlhf_ray.errors import ConfigError, RewardError, WorkerError
from rlhf_ray.roles import Done

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_cluster")]

BUILD_TIMEOUT = 60.0


class Stage:
    """Groups that share a timeline, as those of a stage do. `timeout`: seconds for each call."""

    def __init__(self, logs: Path, turns: bool = False, timeout: float = 30.0) -> None:
        self.logs = logs
        self.turns = Turns(turns)
        self.timeline = Timeline()
        self.timeout = timeout
        self.groups: list[ActorGroup] = []

    def group(self, name: str, count: int = 1, host: type[Host] = Host) -> ActorGroup:
        group = self.unbuilt(name, count, host)
        group.build("tests.actors.workers:Worker", [{"rank": rank} for rank in range(count)], BUILD_TIMEOUT)
        group.wait_until_built()
        return group

    def unbuilt(self, name: str, count: int = 1, host: type[Host] = Host) -> ActorGroup:
        hosts = [
            ray.remote(host).options(num_cpus=0).remote(name, str(self.logs / f"{name}-{rank}.log"))
            for rank in range(count)
        ]
        self.groups.append(ActorGroup(name, hosts, self.turns, self.timeline, self.timeout))
        return self.groups[-1]


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


def test_a_call_goes_to_every_rank_and_answers_with_that_of_rank_0(make_stage: Callable[..., Stage]) -> None:
    group = make_stage().group("policy", 3)
    assert len(group) == 3
    assert group.call("tagged", 7).result() == 7
    each = [pending.result() for pending in group.call_each("tagged", [(1,), (2,), (3,)])]
    assert each == [1, 102, 203]
    assert [group.call_next("tagged", 1).result() for _ in range(4)] == [1, 101, 201, 1]
    group.call("remember", "on all ranks").result()
    heard = [pending.result() for pending in group.call_each("remembered", [()] * 3)]
    assert heard == [["on all ranks"]] * 3
    pids = {pending.result()[1] for pending in group.call_each("who", [()] * 3)}
    assert len(pids) == 3


def test_a_process_is_named_after_the_call_that_it_is_at(make_stage: Callable[..., Stage]) -> None:
    titles = [each.result() for each in make_stage().group("policy", 2).call_each("title", [()] * 2)]
    assert titles == ["ray::policy[0].title", "ray::policy[1].title"]


def test_two_values_of_one_call_travel_apart(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage()
    first, second = stage.group("experience").call_pair("both", 5)
    assert stage.group("policy").call("add", second, 1).result() == -4
    assert (first.result(), second.result()) == (5, -5)


def test_a_pending_argument_goes_from_actor_to_actor(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage()
    engine, policy = stage.group("engine"), stage.group("policy")
    start = time.monotonic()
    array = engine.call("slow_array", 1.0, 1_000_000)
    seen = policy.call("look_at", array)
    assert time.monotonic() - start < 0.5, "calls return before their work is done"
    # It came out of the object store, where arrays are shared and read-only; by value it could be written to.
    assert seen.result() == (499_999_500_000, False)
    assert policy.call("look_at", Done(np.arange(4))).result()[0] == 6


@pytest.mark.parametrize("kind", [ConfigError, RewardError])
def test_what_a_worker_raises_arrives_as_itself(
    make_stage: Callable[..., Stage], kind: type[Exception]
) -> None:
    group = make_stage().group("reward")
    with pytest.raises(kind, match=r"^online\.rewards\.0: said by the worker$") as caught:
        group.call("fail", kind.__name__).result()
    assert caught.type is kind
    assert group.call("tagged", 3).result() == 3, "the actor lives on"


def test_a_mistake_found_while_building_arrives_as_itself(make_stage: Callable[..., Stage]) -> None:
    critic = make_stage().unbuilt("critic")
    critic.build("tests.actors.workers:Worker", [{"fails": "ConfigError"}], BUILD_TIMEOUT)
    with pytest.raises(ConfigError) as caught:
        critic.wait_until_built()
    assert caught.value.mistakes == ("model.path=nowhere: no such folder", "model: second mistake")


def test_the_first_failure_is_raised_at_once(make_stage: Callable[..., Stage]) -> None:
    """Rank 1 raises while rank 0 would wait for it for a minute, as in a collective."""
    group = make_stage().group("policy", 2)
    start = time.monotonic()
    with pytest.raises(RewardError):
        group.call("fail", "RewardError", 1).result()
    assert time.monotonic() - start < 5


def test_a_failure_upstream_is_raised_at_once_whoever_is_waited_for(make_stage: Callable[..., Stage]) -> None:
    """Rank 1 of the critic raises; the value awaited is made of rank 0's, which never comes."""
    stage = make_stage()
    critic, experience = stage.group("critic", 2), stage.group("experience")
    values = critic.call("fail", "RewardError", 1)
    start = time.monotonic()
    with pytest.raises(RewardError):
        experience.call("add", values).result()
    assert time.monotonic() - start < 5


def test_an_unforeseen_error_names_the_call_and_leaves_its_traceback(
    make_stage: Callable[..., Stage],
) -> None:
    stage = make_stage()
    engine, experience = stage.group("engine"), stage.group("experience")
    broken = engine.call("divide", 0)
    with pytest.raises(
        WorkerError, match=r"^engine\.divide failed: ZeroDivisionError: division by zero$"
    ) as caught:
        experience.call("add", broken).result()
    assert "return 1 / by" in str(caught.value.__cause__)
    assert "return 1 / by" in (stage.logs / "engine-0.log").read_text()


def test_a_process_that_dies_is_named(make_stage: Callable[..., Stage]) -> None:
    """Whoever waits for what it would have made, and although its peer hangs."""
    stage = make_stage()
    engines, experience = stage.group("engine", 2), stage.group("experience")
    lost = engines.call("die", 1)
    with pytest.raises(WorkerError, match=r"^engine\[1\]\.die failed: its process died"):
        experience.call("add", lost).result()
    with pytest.raises(WorkerError, match=r"^engine\[1\]\.add failed: its process died"):
        engines.call("add", 1).result()


def test_a_process_that_died_idle_is_named_by_the_next_call(make_stage: Callable[..., Stage]) -> None:
    group = make_stage().group("reference")
    group.call("die_later", 0.1).result()
    time.sleep(1.0)
    with pytest.raises(WorkerError, match=r"^reference\.add failed: its process died"):
        group.call("add", 1).result()


def test_a_death_is_blamed_and_not_the_peer_that_notices_it_first(make_stage: Callable[..., Stage]) -> None:
    """A rank that dies breaks its peers' collective at once; Ray takes a second or more to notice."""
    group = make_stage().group("policy", 2)
    with pytest.raises(WorkerError, match=r"^policy\[1\]\.lose_peer failed: its process died"):
        group.call("lose_peer").result()


def test_who_does_not_answer_is_named_after_the_deadline(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage(timeout=1.5)
    engines, experience = stage.group("engine", 2), stage.group("experience")
    late = engines.call("sleep", 60.0, 0)
    start = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        experience.call("remember", late).result()
    assert 1.4 < time.monotonic() - start < 5
    # Rank 1 has answered; the first named is who hangs, the second waits for it.
    assert str(caught.value) == "no answer within 1.5 s from engine[0].sleep, experience.remember"


def test_who_hangs_in_an_earlier_turn_is_named(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage(turns=True, timeout=1.5)
    reference, policy = stage.group("reference"), stage.group("policy")
    reference.call("sleep", 60.0)
    with pytest.raises(WorkerError, match=r"^no answer within 1\.5 s from reference\.sleep, policy\.tagged$"):
        policy.call("tagged", 1).result()


def test_calls_of_an_async_host_run_beside_each_other_and_the_first_done_come_first(
    make_stage: Callable[..., Stage],
) -> None:
    stage = make_stage(timeout=20.0)
    group = stage.group("engine", 2, host=AsyncHost)
    start = time.monotonic()
    naps = [
        group.call_rank(rank, "nap", seconds) for rank, seconds in ((1, 1.5), (1, 0.3), (0, 1.5), (1, 0.6))
    ]
    tasks = [nap.tasks[0] for nap in naps]
    assert stage.timeline.open.wait_for_first(tasks, 2, 20.0) == [1, 3]
    assert time.monotonic() - start < 1.4
    assert stage.timeline.open.wait_for_first(tasks, 2, 20.0) == [1, 3], "those that have ended count"
    assert [nap.result() for nap in naps] == [1.5, 0.3, 1.5, 0.6]
    assert time.monotonic() - start < 2.5, "not one after the other"


def test_a_failure_among_calls_that_run_beside_each_other_is_raised_by_whoever_waits(
    make_stage: Callable[..., Stage],
) -> None:
    stage = make_stage()
    group = stage.group("engine", host=AsyncHost)
    late = group.call_rank(0, "nap", 30.0)
    group.call_rank(0, "nap", 0.1, True)
    with pytest.raises(RewardError, match="said by the worker"):
        stage.timeline.open.wait_for_first([late.tasks[0]], 1, 20.0)
    with pytest.raises(WorkerError, match=r"^no answer within 0\.5 s from engine\.nap$"):
        stage.timeline.open.wait_for_first([late.tasks[0]], 1, 0.5)


def spans_of(stage: Stage) -> dict[str, list[tuple[float, float]]]:
    spans: dict[str, list[tuple[float, float]]] = {}
    for kind, span in stage.timeline.open.take_spans():
        spans.setdefault(kind, []).append(span)
    return spans


def submit_work(stage: Stage) -> None:
    """Six calls of three groups, two of them of two ranks, all submitted at once."""
    groups = [stage.group("engine", 2), stage.group("policy", 2), stage.group("reward")]
    pending = [
        group.call("sleep", 0.15, kind=f"{group.name}-{turn}") for turn in range(2) for group in groups
    ]
    for each in pending:
        each.result()


def test_with_turns_no_two_calls_overlap_but_a_groups_ranks_do(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage(turns=True)
    submit_work(stage)
    found = spans_of(stage)
    turns = [(min(s for s, _ in spans), max(e for _, e in spans)) for spans in found.values()]
    assert len(turns) == 6
    for (_, end), (start, _) in itertools.pairwise(turns):
        assert start >= end
    for spans in (found["engine-0"], found["policy-1"]):
        (first, first_end), (second, second_end) = spans
        assert max(first, second) < min(first_end, second_end), (
            "ranks work together: they meet in collectives"
        )


def test_without_turns_calls_of_different_groups_overlap(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage(turns=False)
    submit_work(stage)
    spans = spans_of(stage)
    (engine, _), (reward,) = spans["engine-0"], spans["reward-0"]
    assert max(engine[0], reward[0]) < min(engine[1], reward[1])


def test_the_timeline_books_unions(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage(turns=True)
    engines, policy = stage.group("engine", 2), stage.group("policy")
    engines.call("sleep", 0.3, kind="generate").result()
    policy.call("sleep", 0.2, kind="train_policy").result()
    policy.call("sleep", 0.4).result()
    seconds = stage.timeline.take()
    assert set(seconds) == {"time/generate", "time/train_policy", "time/busy", "time/wait"}
    assert seconds["time/wait"] == pytest.approx(seconds["time/generate"], abs=1e-6)
    assert 0.3 <= seconds["time/generate"] < 0.5, "two engines at the same time count once"
    assert 0.2 <= seconds["time/train_policy"] < 0.4
    assert seconds["time/busy"] == pytest.approx(
        seconds["time/generate"] + seconds["time/train_policy"], abs=1e-6
    )
    assert stage.timeline.take() == {}


def test_the_timeline_does_not_wait_for_calls_under_way(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage()
    group = stage.group("engine")
    pending = group.call("sleep", 1.0, kind="generate")
    assert stage.timeline.take() == {}
    pending.result()
    assert 1.0 <= stage.timeline.take()["time/generate"] < 1.5


def test_only_time_in_which_nothing_but_generation_runs_is_waited_for(
    make_stage: Callable[..., Stage],
) -> None:
    stage = make_stage(turns=False)
    engine, policy = stage.group("engine"), stage.group("policy")
    stage.timeline.take()
    ahead = engine.call("sleep", 1.2, kind="generate")
    policy.call("sleep", 0.5, kind="train_policy").result()
    first = stage.timeline.take()
    assert 0.5 <= first["time/busy"] < 0.7
    ahead.result()
    second = stage.timeline.take()
    assert 1.2 <= second["time/generate"] < 1.4, "the whole call, in the step in which it ended"
    assert 0.5 < second["time/wait"] < 0.8, "what was left of it after the first step"
    assert second["time/busy"] == second["time/wait"]


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([], 0.0),
        ([(1.0, 3.0)], 2.0),
        ([(1.0, 3.0), (5.0, 6.0)], 3.0),
        ([(5.0, 6.0), (1.0, 3.0), (2.0, 4.0)], 4.0),
        ([(1.0, 9.0), (2.0, 3.0), (4.0, 10.0)], 9.0),
        ([(1.0, 2.0), (2.0, 3.0)], 2.0),
    ],
)
def test_union_seconds(spans: list[tuple[float, float]], seconds: float) -> None:
    assert union_seconds(spans) == seconds


def test_a_rendezvous_address_is_free_and_of_this_machine(make_stage: Callable[..., Stage]) -> None:
    host, port = make_stage().group("policy").address().rsplit(":", 1)
    assert host == ray.util.get_node_ip_address()
    assert 1024 <= int(port) < 65536


def test_a_host_without_gpus_has_none(make_stage: Callable[..., Stage]) -> None:
    assert make_stage().group("policy", 2).gpus() == []
