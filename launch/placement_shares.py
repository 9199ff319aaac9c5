"""How much each actor of a role gets of what the cluster has: pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from rlhf_ray.config.schema import RoleSection


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
    """What each actor of a role gets. gpus: of all its devices together."""

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


def share_of_device(sections: Sequence[RoleSection], widths: Sequence[int]) -> float:
    """Of one GPU, for each actor on it that does not say what it wants; below 0 if the others want too much.

    Args:
        sections: of the actors on it. widths: devices that each of them has.
    """
    written = [
        float(section.gpus) / width
        for section, width in zip(sections, widths, strict=True)
        if section.gpus != "auto"
    ]
    left, others = 1.0 - sum(written), len(sections) - len(written)
    return _share(left, others, at_most=1.0) if others and left > 0 else min(0.0, round(left, 4))


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
