"""Roles on the same devices: who rests while another works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.group import ActorGroup
from launch.placement import Placement, RoleDemand
from rlhf_ray.config.schema import ClusterSection, PlacementSection, RoleSection
from rlhf_ray.errors import WorkerError
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
