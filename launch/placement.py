"""Which actor gets which share of the cluster, held for a stage."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.calls import Turns
from actors.group import ActorGroup, Losses, Timeline, Unbearable
from actors.host import AsyncHost, Host
from actors.pulse import Pulse
from actors.sharing import Devices, SharingGroup
from launch.placement_layout import Layout, Pool, Seat, in_order_of_nodes, lay_out
from launch.placement_shares import Capacity, RoleDemand, RoleShare, resolve_shares, take_turns
from launch.placement_words import GIB, amount, amounts, fragments, never, nodes_of_cluster
from launch.submission.secrets import passed_on
from rlhf_ray.config.schema import ClusterSection, PlacementSection
from rlhf_ray.errors import ResourceError, WorkerLost
from rlhf_ray.reporting.run_folder import RunFolder

__all__ = [
    "GIB",
    "Capacity",
    "Placement",
    "RoleDemand",
    "RoleShare",
    "resolve_shares",
    "take_turns",
]

MAX_CALLS = 100_000
PATIENCE = 10.0
"""Seconds of waiting for resources before it is said."""


class Placement:
    """The resources of a stage, held until `release`.

    Args:
        losses: is told of the actors that die and are replaced; without it none is.
        say: is told what is waited for, where that takes longer than `PATIENCE`.

    Raises:
        ResourceError: the cluster does not have them, or not within `cluster.start_timeout`.
    """

    def __init__(
        self,
        demands: Sequence[RoleDemand],
        cluster: ClusterSection,
        folder: RunFolder,
        section: PlacementSection | None = None,
        *,
        losses: Losses | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        capacity = Capacity.of_cluster()
        self.demands = {demand.name: demand for demand in demands}
        self.layout: Layout = lay_out(demands, section or PlacementSection(), capacity)
        self.shares = self.layout.shares
        self.cluster = cluster
        self.folder = folder
        self._say = say or (lambda text: None)
        is_shared = any(pool.is_shared for pool in self.layout.pools)
        self.turns = Turns(is_shared or take_turns(demands, self.shares, capacity))
        self.timeline = Timeline(losses or Unbearable(), Pulse(float(cluster.heartbeat_timeout)))
        self._groups: list[ActorGroup] = []
        self._hosts: dict[str, type[Host]] = {}
        self._devices = Devices()
        self._reserved = self._reserve()
        self._nodes = {name: _nodes_of(group) for name, group in self._reserved.items()}
        self._seats = {
            role: in_order_of_nodes(seats, self._nodes[pool.name])
            for pool in self.layout.pools
            for role, seats in pool.seats.items()
        }
        self._machines = _nodes_alive()

    def _reserve(self) -> dict[str, PlacementGroup]:
        """Pool -> its group, all of them there. On one machine nothing can arrive later: too little is said
        at once."""
        pools = self.layout.pools
        missing = ", ".join(never(pools, nodes_of_cluster()))
        if missing and self.cluster.address is None:
            raise ResourceError(self._explain(missing))
        groups = {
            pool.name: placement_group(
                pool.bundles,
                strategy=pool.strategy,
                bundle_label_selector=pool.labels if any(pool.labels) else None,
            )
            for pool in pools
        }
        try:
            self._wait_for(tuple(groups.values()))
        except ResourceError:
            for group in groups.values():
                remove_placement_group(group)
            raise
        return groups

    def _wait_for(self, groups: Sequence[PlacementGroup]) -> None:
        deadline = time.monotonic() + self.cluster.start_timeout

        def are_there(until: float) -> bool:
            # Ray waits for whole seconds.
            return all(group.wait(math.ceil(max(0.0, until - time.monotonic()))) for group in groups)

        if are_there(min(deadline, time.monotonic() + PATIENCE)):
            return
        self._say(f"waiting for at most {self.cluster.start_timeout} s: {self._explain(self._missing())}")
        if not are_there(deadline):
            raise ResourceError(f"after {self.cluster.start_timeout} s: {self._explain(self._missing())}")

    def _missing(self) -> str:
        nodes = nodes_of_cluster()
        return ", ".join(never(self.layout.pools, nodes)) or (
            f"the resources exist but are in use, or not together on single nodes ({fragments(nodes)})"
        )

    def _explain(self, missing: str) -> str:
        capacity = Capacity.of_cluster()
        asked = "; ".join(self._asked(pool) for pool in self.layout.pools)
        have = ", ".join(
            amount(kind, number)
            for kind, number in (
                ("CPU", capacity.cpus),
                ("GPU", capacity.gpus),
                ("memory", capacity.memory),
            )
        )
        return (
            f"placement: asks for {asked}. The cluster has {have}. Missing: {missing}. Lower "
            "placement.<role>.count, cpus or gpus, use a smaller model, or give the cluster more"
        )

    def _asked(self, pool: Pool) -> str:
        if pool.is_shared:
            return f"{len(pool.bundles)} x ({', '.join(pool.seats)}) with {amounts(pool.bundles[0])}"
        parts = []
        for role in pool.seats:
            share, demand = self.shares[role], self.demands[role]
            wanted = {"CPU": share.cpus, "GPU": share.gpus, "memory": float(demand.memory)}
            parts.append(f"{demand.section.count} x {role} with {amounts(wanted)}")
        return "; ".join(parts)

    # Where actors are

    def node_numbers(self, role: str) -> tuple[int, ...]:
        """By rank, the node: 0, 1, … in the order of ranks."""
        nodes = self._nodes[self.layout.pool_of(role).name]
        names = [nodes[seat[0]] for seat in self._seats[role]]
        return tuple(list(dict.fromkeys(names)).index(name) for name in names)

    def shares_devices(self, role: str) -> bool:
        """Whether other roles have its devices while it rests."""
        return self.layout.pool_of(role).is_shared

    def devices(self, group: ActorGroup) -> list[str]:
        """The GPUs of a role, by names that are unique in the cluster; none where it has no GPU."""
        if not self.shares[group.name].gpus:
            return []
        pool = self.layout.pool_of(group.name)
        if pool.is_shared or self.layout.spans(group.name):
            return [f"{pool.name}/{bundle}" for seat in self._seats[group.name] for bundle in seat]
        return group.gpus()

    # Actors

    def start(self, name: str, host: type[Host] = Host) -> ActorGroup:
        """Start the actors of a role; their workers are built by `ActorGroup.build`."""
        self._hosts[name] = host
        return self._grouped(name, self.demands[name].section.count, lambda rank: self.start_one(name, rank))

    def start_helper(self, name: str) -> ActorGroup:
        """Start an actor that needs no share of its own: it works little, and while the others wait."""
        share = RoleShare(0, 0, 1)
        return self._grouped(name, 1, lambda rank: self._start_host(name, share, "DEFAULT", Host, ()))

    def _grouped(self, name: str, count: int, start: Callable[[int], ActorHandle]) -> ActorGroup:
        def lost_machine() -> WorkerLost | None:
            if self._machines <= _nodes_alive():
                return None
            return WorkerLost(
                f"{name}: a machine of the cluster is gone, and with it what was reserved there"
            )

        handles = [start(rank) for rank in range(count)]
        timeout = float(self.cluster.call_timeout)
        if name in self.demands and self.shares_devices(name):
            group: ActorGroup = SharingGroup(
                name, handles, self.turns, self.timeline, timeout, self._devices, start, lost_machine
            )
        else:
            is_apart = name in self.demands and self.demands[name].is_apart
            turns = Turns(enabled=False) if is_apart else self.turns
            group = ActorGroup(name, handles, turns, self.timeline, timeout, start, lost_machine)
        self._groups.append(group)
        return group

    def start_one(self, name: str, rank: int) -> ActorHandle:
        """Start the actor of a rank, or another in the place of one that has died: in its bundle."""
        pool, seat = self.layout.pool_of(name), self._seats[name][rank]
        label = f"{name}-{rank}" if self.demands[name].section.count > 1 else name
        share = self.shares[name]
        strategy = PlacementGroupSchedulingStrategy(
            self._reserved[pool.name],
            placement_group_bundle_index=seat[0],
            # The workers of an engine that spans bundles are its children.
            placement_group_capture_child_tasks=len(seat) > 1,
        )
        return self._start_host(label, share, strategy, self._hosts[name], seat)

    def _start_host(
        self,
        name: str,
        share: RoleShare,
        strategy: PlacementGroupSchedulingStrategy | str,
        host: type[Host],
        seat: Seat,
    ) -> ActorHandle:
        spans = len(seat) > 1
        log = self.folder.logs.resolve() / f"{name}.log"
        actor = ray.remote(host).options(
            num_cpus=share.cpus,
            # The GPUs of an engine that spans bundles are for its workers.
            num_gpus=0 if spans else share.gpus,
            scheduling_strategy=strategy,
            runtime_env={"env_vars": _environment(share.threads) | (_spanning(seat, share) if spans else {})},
            # Ray's default is 1000 where calls run beside each other; every prompt in flight is one.
            **({"max_concurrency": MAX_CALLS} if issubclass(host, AsyncHost) else {}),
        )
        return cast(ActorHandle, actor.remote(name, str(log), passed_on()))

    def wait_until_built(self) -> None:
        """Wait for all workers together: what takes long in building them is importing and loading."""
        for group in self._groups:
            group.wait_until_built()

    def release(self, timeout: float = 20.0) -> None:
        """End all actors and give the resources back. Args: timeout: seconds for those that hang."""
        closing = [ref for group in self._groups for ref in group.begin_close()]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=timeout)
        for group in self._groups:
            group.kill()
        for reserved in self._reserved.values():
            remove_placement_group(reserved)


def _nodes_alive() -> set[str]:
    return {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}


def _environment(threads: int) -> dict[str, str]:
    # Reward functions may lie beside the configuration.
    search_path = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(search_path),
        "OMP_NUM_THREADS": str(threads),
        # Idle threads must not spin: the next role is using the cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def _spanning(seat: Seat, share: RoleShare) -> dict[str, str]:
    """What tells vLLM where to put the workers of a tensor-parallel engine."""
    return {
        "VLLM_RAY_BUNDLE_INDICES": ",".join(map(str, seat)),
        "VLLM_RAY_PER_WORKER_GPUS": f"{share.gpus / len(seat):.4g}",
    }


def _nodes_of(group: PlacementGroup) -> list[str]:
    """Of each bundle."""
    nodes = placement_group_table(group)["bundles_to_node_id"]
    return [str(nodes[index]) for index in range(group.bundle_count)]
