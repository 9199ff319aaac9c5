"""Bundles and seats, without a cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.placement_layout import in_order_of_nodes, lay_out
from launch.placement_shares import Capacity, RoleDemand, RoleShare
from launch.placement_words import Node, has_labels, never
from rlhf_ray.config.schema import PlacementSection, RoleSection
from rlhf_ray.engines.deepspeed_engine import World
from rlhf_ray.errors import ResourceError

GIB = 1 << 30
LARGE = Capacity(cpus=256, gpus=64, memory=1000 * GIB)
LAPTOP = Capacity(cpus=2, gpus=0, memory=16 * GIB)
COLOCATED = PlacementSection(mode="colocated")
DISAGGREGATED = PlacementSection(mode="disaggregated")


def demand(name: str, count: int = 1, width: int = 1, memory: int = 0, **section: object) -> RoleDemand:
    return RoleDemand(name, RoleSection.model_validate({"count": count, **section}), memory, width)


def test_alone_each_device_is_a_bundle() -> None:
    demands = [demand("policy", 2, memory=8), demand("engine", 2, width=4, memory=8)]
    layout = lay_out(demands, PlacementSection(), LARGE)
    (pool,) = layout.pools
    assert pool.seats == {
        "policy": [(0,), (1,)],
        "engine": [(2, 3, 4, 5), (6, 7, 8, 9)],
    }
    assert (
        pool.bundles
        == [{"CPU": 1.0, "GPU": 1.0, "memory": 8.0}] * 2 + [{"CPU": 1.0, "GPU": 1.0, "memory": 2.0}] * 8
    )
    assert layout.shares["engine"] == RoleShare(cpus=1.0, gpus=4, threads=1)
    assert layout.spans("engine") and not layout.spans("policy")


def test_without_gpus_a_tensor_parallel_engine_is_one_bundle() -> None:
    layout = lay_out([demand("engine", width=2)], PlacementSection(), LAPTOP)
    assert layout.pools[0].seats == {"engine": [(0,)]}
    assert layout.pools[0].bundles == [{"CPU": 1.0}]


def test_nodes_are_a_bundle_each_with_consecutive_ranks() -> None:
    section = {"nodes": 2, "labels": {"pool": "h100"}, "cpus": 4}
    layout = lay_out([demand("policy", 8, **section), demand("engine", 2)], PlacementSection(), LARGE)
    policy, engine = layout.pools
    assert policy.strategy == "STRICT_SPREAD"
    assert policy.bundles == [{"CPU": 16.0, "GPU": 4.0}] * 2
    assert policy.labels == [{"pool": "h100"}] * 2
    assert policy.seats == {"policy": [(0,)] * 4 + [(1,)] * 4}
    assert (engine.strategy, engine.labels) == ("PACK", [{}, {}])


def test_a_strategy_makes_a_group_of_its_own() -> None:
    demands = [demand("policy", 2, strategy="STRICT_PACK"), demand("engine"), demand("reward")]
    layout = lay_out(demands, PlacementSection(), LARGE)
    assert [(pool.strategy, list(pool.seats)) for pool in layout.pools] == [
        ("STRICT_PACK", ["policy"]),
        ("PACK", ["engine", "reward"]),
    ]


def test_colocated_roles_have_the_devices_of_the_largest() -> None:
    demands = [
        demand("policy", 4, memory=4),
        demand("critic", 4, memory=4),
        demand("reward", memory=2),
        demand("reference", memory=2),
        demand("engine", 2, width=2, memory=8),
    ]
    layout = lay_out(demands, COLOCATED, LARGE)
    (pool,) = layout.pools
    assert pool.seats == {
        "policy": [(0,), (1,), (2,), (3,)],
        "critic": [(0,), (1,), (2,), (3,)],
        "engine": [(0, 1), (2, 3)],
        "reward": [(0,)],
        "reference": [(1,)],
    }
    assert [bundle["GPU"] for bundle in pool.bundles] == [1.0] * 4
    assert [bundle["memory"] for bundle in pool.bundles] == [14.0, 14.0, 12.0, 12.0]
    gpus = {role: share.gpus for role, share in layout.shares.items()}
    assert gpus == {"policy": 0.25, "critic": 0.25, "reward": 0.25, "reference": 0.25, "engine": 0.5}


def test_colocated_on_a_laptop_is_one_bundle() -> None:
    demands = [demand(name, memory=1) for name in ("policy", "critic", "reward", "reference", "engine")]
    layout = lay_out(demands, COLOCATED, LAPTOP)
    assert layout.pools[0].bundles == [{"CPU": 2.0, "memory": 5.0}]
    assert all(share == RoleShare(0.4, 0.0, 2) for share in layout.shares.values())


def test_disaggregated_engines_have_devices_of_their_own() -> None:
    demands = [
        demand("policy", 4, labels={"pool": "train"}),
        demand("critic", 2),
        demand("engine", 2, width=2, strategy="SPREAD"),
        demand("judge", width=2),
    ]
    layout = lay_out(demands, DISAGGREGATED, LARGE)
    training, generation = layout.pools
    assert training.is_shared and not generation.is_shared
    assert training.seats == {
        "policy": [(0,), (1,), (2,), (3,)],
        "critic": [(0,), (1,)],
        "judge": [(2, 3)],
    }
    assert training.labels == [{"pool": "train"}] * 4
    assert generation.seats == {"engine": [(0, 1), (2, 3)]}
    assert (generation.strategy, generation.labels) == ("SPREAD", [{}] * 4)
    assert layout.shares["engine"].gpus == 2.0, "whole devices"
    assert layout.shares["judge"].gpus == 1.0, "half of each of two"


def test_what_is_written_of_a_device_leaves_the_rest_to_the_others() -> None:
    layout = lay_out([demand("engine", gpus=0.5), demand("policy"), demand("critic")], COLOCATED, LARGE)
    assert {role: share.gpus for role, share in layout.shares.items()} == {
        "engine": 0.5,
        "policy": 0.25,
        "critic": 0.25,
    }
    with pytest.raises(ResourceError) as caught:
        lay_out([demand("engine", gpus=0.7), demand("policy", gpus=0.7)], COLOCATED, LARGE)
    assert str(caught.value) == (
        "placement: engine (gpus: 0.7), policy (gpus: 0.7) share a device, and want more than all of it; "
        "lower placement.<role>.gpus, or leave it out"
    )


def test_ranks_of_a_node_follow_each_other() -> None:
    nodes = ["b", "a", "b", "a", "a", "b", "c"]
    assert in_order_of_nodes([(bundle,) for bundle in range(6)], nodes) == [
        (1,),
        (3,),
        (4,),
        (0,),
        (2,),
        (5,),
    ]
    # Engines of two devices: one on each node, where two straddled them.
    assert in_order_of_nodes([(0, 1), (2, 3)], nodes) == [(1, 3), (0, 2)]
    assert in_order_of_nodes([(6, 0), (2, 5)], nodes) == [(0, 2), (5, 6)], "the node with the most first"
    assert in_order_of_nodes([(0,), (0,), (1,), (1,)], ["z", "y"]) == [(1,), (1,), (0,), (0,)]


def test_ranks_know_their_node() -> None:
    world = World(3, 4, "10.0.0.1:29500", threads=1, use_gpu=False, nodes=(0, 0, 1, 1))
    assert world.environment == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
    }
    assert replace(world, use_gpu=True).environment["LOCAL_RANK"] == "0", "of the one device that it sees"
    assert replace(world, nodes=()).environment["LOCAL_SIZE"] == "4"


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [("h100", True), ("!h100", False), ("in(a100, h100)", True), ("in(a100)", False), ("!in(a100)", True)],
)
def test_labels_by_the_rules_of_ray(wanted: str, fits: bool) -> None:
    assert has_labels(Node("n", {}, {}, {"pool": "h100"}), {"pool": wanted}) == fits


class TestWhatIsMissing:
    NODES = (
        Node("10.0.0.1", {"CPU": 8, "GPU": 4, "memory": 64 * GIB}, {}, {"pool": "a100"}),
        Node("10.0.0.2", {"CPU": 8, "GPU": 4, "memory": 64 * GIB}, {}, {"pool": "a100"}),
    )

    def said(self, *demands: RoleDemand, mode: str = "auto") -> list[str]:
        placement = PlacementSection.model_validate({"mode": mode})
        layout = lay_out(demands, placement, Capacity(16, 8, 128 * GIB))
        return list(never(layout.pools, self.NODES))

    def test_nothing(self) -> None:
        assert self.said(demand("policy", 4), demand("engine", 4)) == []

    def test_amounts(self) -> None:
        assert self.said(demand("policy", 9, gpus=1), demand("reward", cpus=12)) == [
            "5 CPU more, 1.8 GPU more"
        ]

    def test_labels_that_no_node_has(self) -> None:
        assert self.said(demand("policy", labels={"pool": "h100"})) == [
            "a node with the labels pool=h100 (nodes have pool=a100)"
        ]
        assert self.said(demand("policy", labels={"zone": "eu"})) == [
            "a node with the labels zone=eu (nodes have none called zone)"
        ]

    def test_what_no_single_node_has(self) -> None:
        assert self.said(demand("policy", 2, cpus=9, gpus=0)) == ["2 CPU more"]
        assert self.said(demand("policy", cpus=9, gpus=0)) == ["a single node with 9 CPU"]
        assert self.said(demand("policy", 6, nodes=1)) == ["a single node with 6 CPU, 6 GPU"]
        assert self.said(demand("policy", 6, strategy="STRICT_PACK")) == [
            "a single node with 6 CPU, 6 GPU for all of policy (STRICT_PACK)"
        ]

    def test_too_few_nodes_to_spread_over(self) -> None:
        assert self.said(demand("policy", 6, nodes=3)) == ["1 more nodes for policy, each of which takes one"]
