"""Shares of the cluster, and what a person is told when there is not enough."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from launch.placement import (
    GIB,
    Capacity,
    Placement,
    RoleDemand,
    RoleShare,
    resolve_shares,
    take_turns,
)
from rlhf_ray.config.schema import ClusterSection, RoleSection
from rlhf_ray.errors import ResourceError
from rlhf_ray.reporting.run_folder import RunFolder

ALONE = ClusterSection(start_timeout=60)


def demand(
    name: str, count: int = 1, memory: float = 0.1, gpus_per_actor: int = 1, **section: object
) -> RoleDemand:
    return RoleDemand(name, RoleSection(count=count, **section), int(memory * GIB), gpus_per_actor)  # type: ignore[arg-type]


ROLES = [demand(name) for name in ("policy", "critic", "reference", "reward", "engine")]


def test_auto_shares_of_a_laptop() -> None:
    capacity = Capacity(cpus=2, gpus=0, memory=8 * GIB)
    shares = resolve_shares(ROLES, capacity)
    assert shares == {role.name: RoleShare(cpus=0.4, gpus=0, threads=2) for role in ROLES}
    assert take_turns(ROLES, shares, capacity), "ten threads on two cores"


def test_ranks_of_a_role_share_the_cores() -> None:
    capacity = Capacity(cpus=8, gpus=0, memory=8 * GIB)
    demands = [demand("policy", 4), demand("engine", 3)]
    shares = resolve_shares(demands, capacity)
    assert shares == {"policy": RoleShare(1.0, 0, threads=2), "engine": RoleShare(1.0, 0, threads=2)}
    assert take_turns(demands, shares, capacity), "14 threads on 8 cores"


def test_shares_never_add_up_to_more_than_there_is() -> None:
    for cpus in range(1, 9):
        for count in range(1, 20):
            share = resolve_shares([demand("engine", count)], Capacity(cpus, 0, GIB))["engine"]
            assert 0 < share.cpus * count <= cpus + 1e-9
            assert share.threads >= 1


def test_a_role_of_its_own_needs_no_turns() -> None:
    capacity = Capacity(cpus=2, gpus=0, memory=8 * GIB)
    demands = [demand("policy", 2)]
    shares = resolve_shares(demands, capacity)
    assert shares == {"policy": RoleShare(1.0, 0, threads=1)}
    assert not take_turns(demands, shares, capacity)


def test_what_is_written_is_taken() -> None:
    written = demand("policy", 2, cpus=3.5, gpus=0.25, threads=7)
    capacity = Capacity(cpus=16, gpus=1, memory=GIB)
    shares = resolve_shares([written, demand("engine")], capacity)
    assert shares["policy"] == RoleShare(cpus=3.5, gpus=0.25, threads=7)
    assert shares["engine"] == RoleShare(cpus=1.0, gpus=0.33, threads=1)
    assert take_turns([written], shares, capacity), "two ranks on one GPU"


def test_enough_gpus_are_one_an_actor_or_as_many_as_an_engine_is_parallel() -> None:
    demands = [demand("policy", 2), demand("engine", 2, gpus_per_actor=4)]
    capacity = Capacity(cpus=64, gpus=16, memory=GIB)
    shares = resolve_shares(demands, capacity)
    assert shares == {"policy": RoleShare(1.0, 1, 1), "engine": RoleShare(1.0, 4, 1)}
    assert not take_turns(demands, shares, capacity)


@pytest.mark.parametrize(
    ("cpus", "threads", "of_engines", "of_others"),
    [(1, "auto", 1, 1), (2, "auto", 1, 1), (16, "auto", 4, 8), (16, 6, 6, 4), (16, 8, 8, 1)],
)
def test_what_works_apart_has_cores_of_its_own(
    cpus: float, threads: object, of_engines: int, of_others: int
) -> None:
    capacity = Capacity(cpus=cpus, gpus=0, memory=8 * GIB)
    engines = replace(demand("engine", 2, threads=threads), is_apart=True)
    demands = [*ROLES[:4], engines]
    shares = resolve_shares(demands, capacity)
    assert shares["engine"].threads == of_engines
    assert {shares[role.name].threads for role in ROLES[:4]} == {of_others}
    assert take_turns(demands, shares, capacity), "four roles on the cores of one"
    assert not take_turns([ROLES[0], engines], shares, capacity), "each has its own"


@pytest.mark.actors
@pytest.mark.usefixtures("ray_cluster")
class TestOnACluster:
    """Two CPUs and 16 GiB of memory."""

    def test_too_many_cpus_are_refused_at_once(self, tmp_path: Path) -> None:
        start = time.monotonic()
        with pytest.raises(ResourceError) as caught:
            Placement([demand("policy", cpus=100, memory=0.5)], ALONE, RunFolder(tmp_path))
        assert time.monotonic() - start < 5
        assert str(caught.value) == (
            "placement: asks for 1 x policy with 100 CPU, 0.5 GiB memory. The cluster has 2 CPU, 0 GPU, "
            "16.0 GiB memory. Missing: 98 CPU more. Lower placement.<role>.count, cpus or gpus, use a "
            "smaller model, or give the cluster more"
        )

    def test_too_much_memory_is_refused_at_once(self, tmp_path: Path) -> None:
        start = time.monotonic()
        with pytest.raises(ResourceError, match=r"Missing: 999984\.0 GiB memory more\."):
            Placement([demand("engine", memory=10**6)], ALONE, RunFolder(tmp_path))
        assert time.monotonic() - start < 5

    def test_everything_that_is_missing_is_said(self, tmp_path: Path) -> None:
        demands = [demand("policy", 3, cpus=1, memory=1), demand("engine", gpus=2, memory=14.5)]
        with pytest.raises(ResourceError) as caught:
            Placement(demands, ALONE, RunFolder(tmp_path))
        assert "3 x policy with 1 CPU, 1.0 GiB memory; 1 x engine with " in str(caught.value)
        assert "Missing: 1.5 CPU more, 2 GPU more, 1.5 GiB memory more." in str(caught.value)

    def test_on_a_joined_cluster_the_deadline_is_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """There, a node may come; what for is said before."""
        monkeypatch.setattr("launch.placement.PATIENCE", 0.5)
        joined, said = ClusterSection(address="auto", start_timeout=2), list[str]()
        start = time.monotonic()
        with pytest.raises(ResourceError, match=r"^after 2 s: placement: .* Missing: 98 CPU more\."):
            Placement([demand("policy", cpus=100)], joined, RunFolder(tmp_path), say=said.append)
        assert [text[:35] for text in said] == ["waiting for at most 2 s: placement:"]
        assert "98 CPU more" in said[0]
        assert 1.9 < time.monotonic() - start < 6
        self.assert_all_is_free()

    def test_what_others_use_is_told_from_what_is_not_there(self, tmp_path: Path) -> None:
        first = Placement([demand("policy", cpus=2)], ALONE, RunFolder(tmp_path))
        with pytest.raises(ResourceError, match="the resources exist but are in use"):
            Placement([demand("engine", cpus=1)], ClusterSection(start_timeout=1), RunFolder(tmp_path))
        first.release()
        self.assert_all_is_free()

    def test_actors_start_with_their_share_and_give_it_back(self, tmp_path: Path) -> None:
        placement = Placement([demand("policy", 2)], ALONE, RunFolder(tmp_path))
        policy, helper = placement.start("policy"), placement.start_helper("experience")
        for group in (policy, helper):
            kwargs = [{"rank": rank} for rank in range(len(group))]
            group.build("tests.actors.workers:Worker", kwargs, 60)
        placement.wait_until_built()
        assert policy.call("environment", "OMP_NUM_THREADS").result() == "1"
        assert ray.available_resources().get("CPU", 0.0) == 0.0
        assert {path.name for path in (tmp_path / "logs").iterdir()} == {
            "policy-0.log",
            "policy-1.log",
            "experience.log",
        }
        placement.release()
        self.assert_all_is_free()

    def test_what_works_apart_does_so_beside_the_others(self, tmp_path: Path) -> None:
        demands = [demand("policy"), demand("critic"), replace(demand("engine"), is_apart=True)]
        placement = Placement(demands, ALONE, RunFolder(tmp_path))
        policy, critic, engine = (placement.start(each.name) for each in demands)
        for group in (policy, critic, engine):
            group.build("tests.actors.workers:Worker", [{}], 60)
        placement.wait_until_built()
        calls = [group.call("sleep", 0.4, kind=group.name) for group in (engine, policy, critic)]
        for call in calls:
            call.result()
        seconds = placement.timeline.take()
        assert 0.8 <= seconds["time/busy"] < 1.1, "policy and critic one after the other, the engine beside"
        placement.release()
        self.assert_all_is_free()

    def test_release_does_not_wait_for_an_actor_that_hangs(self, tmp_path: Path) -> None:
        placement = Placement([demand("policy", 2)], ALONE, RunFolder(tmp_path))
        group = placement.start("policy")
        group.build("tests.actors.workers:Worker", [{"rank": 0}, {"rank": 1}], 60)
        group.wait_until_built()
        group.call("sleep", 600.0)
        start = time.monotonic()
        placement.release(timeout=1.0)
        assert time.monotonic() - start < 6
        self.assert_all_is_free()

    @staticmethod
    def assert_all_is_free() -> None:
        deadline = time.monotonic() + 10
        while ray.available_resources().get("CPU", 0.0) != 2.0:
            assert time.monotonic() < deadline, ray.available_resources()
            time.sleep(0.1)
