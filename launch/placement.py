"""Which actor gets which share of the cluster, and what to say when there is not enough."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.calls import Turns
from actors.group import ActorGroup, Losses, Timeline, Unbearable
from actors.host import AsyncHost, Host
from actors.pulse import Pulse
from rlhf_ray.config.schema import ClusterSection, RoleSection
from rlhf_ray.errors import ResourceError, WorkerLost
from rlhf_ray.reporting.run_folder import RunFolder

GIB = 1 << 30
MAX_CALLS = 100_000


@dataclass(frozen=True)
class RoleDemand:
    """What one role asks for.

    Fields:
        memory: bytes an actor. gpus_per_actor: devices of an actor, where there are any.
        is_apart: works while the other roles work, on cores of its own.
    """

    name: str
    section: RoleSection
    memory: int
    gpus_per_actor: int = 1
    is_apart: bool = False

    def threads_of(self, cores: int) -> int:
        """Of each actor, where the role has so many cores to itself while it works."""
        threads = self.section.threads
        return max(1, cores // self.section.count) if threads == "auto" else threads


@dataclass(frozen=True)
class RoleShare:
    """What each actor of a role gets."""

    cpus: float
    gpus: float
    threads: int


@dataclass(frozen=True)
class Capacity:
    """CPUs, GPUs and bytes of memory of the whole cluster."""

    cpus: float
    gpus: float
    memory: float

    @classmethod
    def of_cluster(cls) -> Capacity:
        found = ray.cluster_resources()
        return cls(found.get("CPU", 0.0), found.get("GPU", 0.0), found.get("memory", 0.0))


def resolve_shares(demands: Sequence[RoleDemand], capacity: Capacity) -> dict[str, RoleShare]:
    """Fill in every `auto`: an equal share of the CPUs; a GPU an actor, or an equal share of too few; and as
    many threads as the role's actors have cores to themselves while it works."""
    cores = _cores_together(demands, capacity)
    num_actors = sum(demand.section.count for demand in demands)
    shares = {}
    for demand in demands:
        section = demand.section
        gpus = section.gpus
        if gpus == "auto":
            wanted = demand.gpus_per_actor
            gpus = _share(capacity.gpus, num_actors, at_most=wanted) if capacity.gpus else 0.0
        cpus = _share(capacity.cpus, num_actors, at_most=1.0) if section.cpus == "auto" else section.cpus
        threads = demand.threads_of(_cores_apart(capacity) if demand.is_apart else cores)
        if section.threads == "auto" and gpus:
            threads = 1
        shares[demand.name] = RoleShare(cpus, gpus, threads)
    return shares


def _cores_apart(capacity: Capacity) -> int:
    """Half of all: nothing is known of how long sampling takes and how long the rest."""
    return max(1, int(capacity.cpus) // 2)


def _cores_together(demands: Sequence[RoleDemand], capacity: Capacity) -> int:
    """Those that the roles that take turns have: all but what works apart."""
    apart = [demand for demand in demands if demand.is_apart]
    taken = sum(demand.section.count * demand.threads_of(_cores_apart(capacity)) for demand in apart)
    return max(1, int(capacity.cpus) - taken)


def _share(total: float, parts: int, at_most: float) -> float:
    # Ray counts in steps of 1/10000; hundredths are readable and never add up to more than there is.
    return min(at_most, math.floor(100 * total / parts) / 100)


def take_turns(demands: Sequence[RoleDemand], shares: Mapping[str, RoleShare], capacity: Capacity) -> bool:
    """Whether the roles have more threads, or want more GPUs, than there are, and must work in turn; those
    that are apart do not."""
    together = [demand for demand in demands if not demand.is_apart]
    threads = sum(demand.section.count * shares[demand.name].threads for demand in together)
    gpus_shared = any(0 < shares[demand.name].gpus < 1 for demand in together)
    too_many = threads > _cores_together(demands, capacity)
    return gpus_shared or (too_many and not any(share.gpus for share in shares.values()))


class Placement:
    """The resources of a stage, held until `release`.

    Args:
        losses: is told of the actors that die and are replaced; without it none is.

    Raises:
        ResourceError: the cluster does not have them, or not within `cluster.start_timeout`.
    """

    def __init__(
        self,
        demands: Sequence[RoleDemand],
        cluster: ClusterSection,
        folder: RunFolder,
        *,
        losses: Losses | None = None,
    ) -> None:
        capacity = Capacity.of_cluster()
        self.demands = {demand.name: demand for demand in demands}
        self.shares = resolve_shares(demands, capacity)
        self.cluster = cluster
        self.folder = folder
        self.turns = Turns(take_turns(demands, self.shares, capacity))
        self.timeline = Timeline(losses or Unbearable(), Pulse(float(cluster.heartbeat_timeout)))
        self._groups: list[ActorGroup] = []
        self._first_bundle: dict[str, int] = {}
        bundles: list[dict[str, float]] = []
        for demand in demands:
            self._first_bundle[demand.name] = len(bundles)
            bundles += [self._bundle(demand)] * demand.section.count
        self._group = self._reserve(bundles, capacity)
        self._nodes = _nodes_alive()

    def _bundle(self, demand: RoleDemand) -> dict[str, float]:
        share = self.shares[demand.name]
        wanted = {"CPU": share.cpus, "GPU": share.gpus, "memory": float(demand.memory)}
        return {name: amount for name, amount in wanted.items() if amount}

    def _reserve(self, bundles: list[dict[str, float]], capacity: Capacity) -> PlacementGroup:
        """Wait for the bundles; on one machine nothing can arrive later: too little is said at once."""
        missing = self._missing(bundles, capacity)
        if missing and self.cluster.address is None:
            raise ResourceError(self._explain(missing, capacity))
        group = placement_group(bundles, strategy="PACK")
        if not group.wait(timeout_seconds=self.cluster.start_timeout):
            remove_placement_group(group)
            waited = f"after {self.cluster.start_timeout} s: "
            in_use = (
                missing or "the resources exist but are in use, or no single node has enough for an actor"
            )
            raise ResourceError(waited + self._explain(in_use, Capacity.of_cluster()))
        return group

    @staticmethod
    def _missing(bundles: Sequence[Mapping[str, float]], capacity: Capacity) -> str:
        """What the cluster lacks even when it is empty."""
        have = {"CPU": capacity.cpus, "GPU": capacity.gpus, "memory": capacity.memory}
        lacking = []
        for name, amount in have.items():
            asked = sum(bundle.get(name, 0.0) for bundle in bundles)
            if asked > amount + 1e-6:
                lacking.append(f"{_amount(name, asked - amount)} more")
        return ", ".join(lacking)

    def _explain(self, missing: str, capacity: Capacity) -> str:
        asked = "; ".join(
            f"{demand.section.count} x {name} with "
            + ", ".join(_amount(kind, amount) for kind, amount in self._bundle(demand).items())
            for name, demand in self.demands.items()
        )
        have = ", ".join(
            _amount(name, amount)
            for name, amount in (("CPU", capacity.cpus), ("GPU", capacity.gpus), ("memory", capacity.memory))
        )
        return (
            f"placement: asks for {asked}. The cluster has {have}. Missing: {missing}. Lower "
            "placement.<role>.count, cpus or gpus, use a smaller model, or give the cluster more"
        )

    def start(self, name: str, host: type[Host] = Host) -> ActorGroup:
        """Start the actors of a role; their workers are built by `ActorGroup.build`."""
        share, demand = self.shares[name], self.demands[name]

        def start(rank: int) -> ActorHandle:
            own = f"{name}-{rank}" if demand.section.count > 1 else name
            return self._start_host(own, share, self._first_bundle[name] + rank, host)

        return self._grouped(name, demand.section.count, start)

    def start_helper(self, name: str) -> ActorGroup:
        """Start an actor that needs no share of its own: it works little, and while the others wait."""
        return self._grouped(name, 1, lambda rank: self._start_host(name, RoleShare(0, 0, 1), None))

    def _grouped(self, name: str, count: int, start: Callable[[int], ActorHandle]) -> ActorGroup:
        def lost_machine() -> WorkerLost | None:
            if self._nodes <= _nodes_alive():
                return None
            return WorkerLost(
                f"{name}: a machine of the cluster is gone, and with it what was reserved there"
            )

        is_apart = name in self.demands and self.demands[name].is_apart
        turns = Turns(enabled=False) if is_apart else self.turns
        handles = [start(rank) for rank in range(count)]
        timeout = float(self.cluster.call_timeout)
        group = ActorGroup(name, handles, turns, self.timeline, timeout, start, lost_machine)
        self._groups.append(group)
        return group

    def _start_host(
        self, name: str, share: RoleShare, bundle: int | None, host: type[Host] = Host
    ) -> ActorHandle:
        strategy: PlacementGroupSchedulingStrategy | str = "DEFAULT"
        if bundle is not None:
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        log = self.folder.logs.resolve() / f"{name}.log"
        actor = ray.remote(host).options(
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            scheduling_strategy=strategy,
            runtime_env={"env_vars": _environment(share.threads)},
            # Ray's default is 1000 where calls run beside each other; every prompt in flight is one.
            **({"max_concurrency": MAX_CALLS} if issubclass(host, AsyncHost) else {}),
        )
        return cast(ActorHandle, actor.remote(name, str(log)))

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
        remove_placement_group(self._group)


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


def _amount(kind: str, amount: float) -> str:
    if kind == "memory":
        return f"{amount / GIB:.1f} GiB memory"
    return f"{amount:g} {kind}"
