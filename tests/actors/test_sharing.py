"""Roles on the same devices: who rests while another works."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.group import ActorGroup
from benchmarks.victims import kill, processes
from launch.placement import Placement, RoleDemand
from rlhf_ray.config.schema import ClusterSection, PlacementSection, RoleSection
from rlhf_ray.errors import RlhfRayError, WorkerError, WorkerLost
from rlhf_ray.reporting.run_folder import RunFolder

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def placement(tmp_path: Path) -> Iterator[Placement]:
    demands = [RoleDemand(name, RoleSection(), 0) for name in ("engine", "policy", "critic")]
    section = PlacementSection(mode="colocated")
    placement = Placement(demands, ClusterSection(start_timeout=60), RunFolder(tmp_path), section)
    yield placement
    placement.release()


def started(placement: Placement, *names: str) -> list[ActorGroup]:
    groups = [placement.start(name) for name in names]
    for group in groups:
        group.build("tests.actors.workers:Worker", [{}], 60)
    placement.wait_until_built()
    return groups


def moves_of(group: ActorGroup) -> list[str]:
    """What a group was told, from its build to this question, for which it wakes if it rests."""
    return [str(move) for move in group.call("remembered").result()]  # type: ignore[attr-defined]


def test_only_one_role_is_on_the_devices(placement: Placement) -> None:
    engine, policy, critic = started(placement, "engine", "policy", "critic")
    engine.call("remember", "generates")
    for _ in range(2):
        policy.call("remember", "trains")
    critic.call("remember", "trains")
    policy.call("remember", "trains")
    asked = [moves_of(group) for group in (engine, policy, critic)]
    # Each rests as soon as the next is built, or asked.
    assert asked == [
        ["rest", "wake", "generates", "rest", "wake"],
        ["rest", "wake", "trains", "trains", "rest", "wake", "trains", "rest", "wake"],
        ["rest", "wake", "trains", "rest", "wake"],
    ]
    kinds = placement.timeline.take()
    assert kinds["time/hand_over"] > 0


def test_an_engine_that_receives_wakes_in_part(placement: Placement) -> None:
    engine, policy = started(placement, "engine", "policy")
    policy.call("remember", "trains")
    policy.call("publish")
    engine.call("remember", "generates")
    assert moves_of(engine) == ["rest", "wake weights", "wake", "generates"]
    assert moves_of(policy) == ["trains", "publish", "rest", "wake"]


def test_a_role_is_built_when_those_before_it_are(placement: Placement) -> None:
    engine, policy = placement.start("engine"), placement.start("policy")
    engine.build("tests.actors.workers:Worker", [{"fails": "ModelError"}], 60)
    with pytest.raises(Exception, match="no such folder"):
        policy.build("tests.actors.workers:Worker", [{}], 60)


def test_a_role_that_cannot_rest_fails_what_comes_after(placement: Placement) -> None:
    engine, policy = started(placement, "engine", "policy")
    engine.call("remember", "generates")
    engine.handles[0].build.remote("tests.actors.workers:Restless", {})
    with pytest.raises(WorkerError, match=r"engine\.rest failed"):
        policy.call("remember", "trains").result()


class Noted:
    """The losses and returns of actors."""

    def __init__(self) -> None:
        self.losses: Counter[str] = Counter()
        self.returns: Counter[str] = Counter()

    def lost(self, name: str, failure: RlhfRayError) -> None:
        self.losses[name] += 1

    def returned(self, name: str) -> None:
        self.returns[name] += 1


class Household:
    """A reward and a policy on the same devices."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.losses, self.diary = folder, Noted(), folder / "diary.txt"
        demands = [RoleDemand(name, RoleSection(), 0) for name in ("reward", "policy")]
        section = PlacementSection(mode="colocated")
        cluster = ClusterSection(start_timeout=60)
        self.placement = Placement(demands, cluster, RunFolder(folder), section, losses=self.losses)
        self.reward, self.policy = (self.placement.start(name) for name in ("reward", "policy"))
        for group in (self.reward, self.policy):
            kwargs: dict[str, object] = {"name": group.name, "diary": str(self.diary)}
            is_pure = group is self.reward
            group.build("tests.actors.workers:Diarist", [kwargs], 60, is_pure=is_pure)
        self.placement.wait_until_built()
        self.diary.unlink()

    def kill_reward_after(self, words: str) -> None:
        deadline = time.monotonic() + 30
        while words not in self.days:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert kill(processes(self.folder)["reward"])

    @property
    def days(self) -> list[str]:
        return self.diary.read_text().splitlines() if self.diary.exists() else []


@pytest.fixture
def household(tmp_path: Path) -> Iterator[Household]:
    household = Household(tmp_path)
    yield household
    household.placement.release()


def test_a_role_that_dies_at_work_is_replaced_on_its_devices(household: Household) -> None:
    scores = household.reward.call("work", 2.0)
    trained = household.policy.call("work", 0.0, scores)
    household.kill_reward_after("reward begins")
    assert trained.result() == "policy"
    assert household.days == [
        "policy rests",
        "reward wakes",
        "reward begins",
        "reward built",
        "reward begins",
        "reward ends",
        "reward rests",
        "policy wakes",
        "policy begins",
        "policy ends",
    ]
    assert household.losses.losses == household.losses.returns == {"reward": 1}


def test_a_role_that_dies_at_rest_is_replaced_when_the_devices_are_its_own(household: Household) -> None:
    household.policy.call("work", 4.0)
    scores = household.reward.call("work", 0.0)
    household.kill_reward_after("policy begins")
    assert scores.result() == "reward"
    assert household.days == [
        "policy begins",
        "policy ends",
        "policy rests",
        "reward built",
        "reward wakes",
        "reward begins",
        "reward ends",
    ]
    assert household.losses.losses == household.losses.returns == {"reward": 1}


def test_none_is_replaced_where_another_has_died_before_its_turn(household: Household) -> None:
    """Who has the devices then is not known."""
    household.policy.call("work", 4.0)
    scores = household.reward.call("work", 0.0)
    household.kill_reward_after("policy begins")
    assert kill(processes(household.folder)["policy"])
    with pytest.raises(WorkerLost, match="its process died"):
        scores.result()
    assert not household.losses.losses
    assert "reward built" not in household.days
