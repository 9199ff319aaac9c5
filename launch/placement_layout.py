"""From shares to bundles: what is reserved together, and which bundles an actor sits in. Pure, without a
cluster.

A pool is what one of Ray's placement groups holds. Roles that share devices share a pool, whose bundles are
one device each: an actor has one of them, or as many as it has devices (a tensor-parallel engine). Other
roles have bundles of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from launch.placement_shares import Capacity, RoleDemand, RoleShare, resolve_shares, share_of_device
from rlhf_ray.config.schema import PlacementSection, Strategy
from rlhf_ray.errors import ResourceError

Seat = tuple[int, ...]
"""Bundles of an actor, which is in the first itself."""


@dataclass
class Pool:
    """
    Fields:
        bundles: resources of each; labels: that its node must have.
        seats: role -> one a rank.
        is_shared: whether roles use its devices in turn, and rest meanwhile.
    """

    name: str
    strategy: Strategy = "PACK"
    is_shared: bool = False
    bundles: list[dict[str, float]] = field(default_factory=list)
    labels: list[dict[str, str]] = field(default_factory=list)
    seats: dict[str, list[Seat]] = field(default_factory=dict)

    def add(self, resources: Mapping[str, float], labels: Mapping[str, str]) -> int:
        self.bundles.append({name: amount for name, amount in resources.items() if amount})
        self.labels.append(dict(labels))
        return len(self.bundles) - 1


@dataclass(frozen=True)
class Layout:
    shares: dict[str, RoleShare]
    pools: tuple[Pool, ...]

    def pool_of(self, role: str) -> Pool:
        return next(pool for pool in self.pools if role in pool.seats)

    def spans(self, role: str) -> bool:
        """Whether each actor of the role has several bundles, with a worker in each."""
        return any(len(seat) > 1 for seat in self.pool_of(role).seats[role])


def lay_out(demands: Sequence[RoleDemand], placement: PlacementSection, capacity: Capacity) -> Layout:
    """
    Raises:
        ResourceError: roles want more of a device than there is of one.
    """
    shares = resolve_shares(demands, capacity)
    pools: dict[str, Pool] = {}
    if placement.mode == "auto":
        for demand in demands:
            section = demand.section
            has_own = section.nodes is not None or section.strategy is not None
            pool = pools.setdefault(demand.name if has_own else "", Pool(demand.name if has_own else "all"))
            pool.strategy = "STRICT_SPREAD" if section.nodes is not None else section.strategy or "PACK"
            _seat_alone(pool, demand, shares[demand.name])
        return Layout(shares, tuple(pools.values()))
    together: dict[str, list[RoleDemand]] = {}
    for demand in demands:
        together.setdefault(placement.pool_of(demand.name), []).append(demand)
    for name, members in together.items():
        pools[name] = Pool(name, is_shared=placement.mode == "colocated" or name == "training")
        _seat_together(pools[name], members, shares, on_gpus=capacity.gpus > 0)
    return Layout(shares, tuple(pools.values()))


def _seat_alone(pool: Pool, demand: RoleDemand, share: RoleShare) -> None:
    """A bundle a device; with `nodes`, a bundle a node with all that is on it."""
    section, memory = demand.section, float(demand.memory)
    if section.nodes is not None:
        on_node = section.count // section.nodes
        whole = {"CPU": share.cpus * on_node, "GPU": share.gpus * on_node, "memory": memory * on_node}
        bundles = [pool.add(whole, section.labels) for _ in range(section.nodes)]
        pool.seats[demand.name] = [(bundles[rank // on_node],) for rank in range(section.count)]
        return
    width = demand.gpus_per_actor if share.gpus else 1
    one = {"CPU": share.cpus, "GPU": share.gpus / width, "memory": memory / width}
    pool.seats[demand.name] = [
        tuple(pool.add(one, section.labels) for _ in range(width)) for _ in range(section.count)
    ]


def _seat_together(
    pool: Pool, members: Sequence[RoleDemand], shares: dict[str, RoleShare], *, on_gpus: bool
) -> None:
    """As many devices as the largest role has; the smaller ones sit where there is most room."""
    widths = {demand.name: demand.gpus_per_actor if on_gpus else 1 for demand in members}
    sizes = {demand.name: demand.section.count * widths[demand.name] for demand in members}
    on_device: list[list[RoleDemand]] = [[] for _ in range(max(sizes.values()))]
    for demand in sorted(members, key=lambda demand: -sizes[demand.name]):
        emptiest = sorted(range(len(on_device)), key=lambda device: len(on_device[device]))
        mine = sorted(emptiest[: sizes[demand.name]])
        for device in mine:
            on_device[device].append(demand)
        width = widths[demand.name]
        pool.seats[demand.name] = [tuple(mine[at : at + width]) for at in range(0, len(mine), width)]
    if on_gpus:
        _divide_devices(pool, on_device, widths, shares)
    pool.strategy = next((d.section.strategy for d in members if d.section.strategy), "PACK")
    labels = next((d.section.labels for d in members if d.section.labels), {})
    for sharing in on_device:
        cpus = sum(shares[demand.name].cpus for demand in sharing)
        memory = sum(demand.memory / widths[demand.name] for demand in sharing)
        pool.add({"CPU": round(cpus, 4), "GPU": 1.0 if on_gpus else 0.0, "memory": memory}, labels)


def _divide_devices(
    pool: Pool,
    on_device: Sequence[Sequence[RoleDemand]],
    widths: Mapping[str, int],
    shares: dict[str, RoleShare],
) -> None:
    left = [
        share_of_device([demand.section for demand in sharing], [widths[demand.name] for demand in sharing])
        for sharing in on_device
    ]
    for sharing, free in zip(on_device, left, strict=True):
        takes_all = free <= 0 and any(demand.section.gpus == "auto" for demand in sharing)
        if free < 0 or takes_all:
            names = ", ".join(f"{demand.name} (gpus: {demand.section.gpus})" for demand in sharing)
            raise ResourceError(
                f"placement: {names} share a device, and want more than all of it; lower "
                "placement.<role>.gpus, or leave it out"
            )
    for name, seats in pool.seats.items():
        section = next(d.section for sharing in on_device for d in sharing if d.name == name)
        if section.gpus == "auto":
            one = min(left[device] for seat in seats for device in seat)
            shares[name] = replace(shares[name], gpus=round(one * widths[name], 4))
        shares[name] = replace(shares[name], threads=1 if section.threads == "auto" else shares[name].threads)


def in_order_of_nodes(seats: Sequence[Seat], nodes: Sequence[str]) -> list[Seat]:
    """The same bundles dealt out anew, so that neighbours in rank, and the bundles of an actor, are on one
    node as far as that goes. Bundles of a role hold the same of it.

    Args:
        nodes: of each bundle, by any name.
    """
    if len({bundle for seat in seats for bundle in seat}) < sum(len(seat) for seat in seats):
        bundles = [seat[0] for seat in seats]  # several ranks in the bundle of a node
        return [(bundle,) for bundle in _by_node(bundles, nodes)]
    width = len(seats[0])
    flat = _by_node([bundle for seat in seats for bundle in seat], nodes)
    return [tuple(flat[at : at + width]) for at in range(0, len(flat), width)]


def _by_node(bundles: Sequence[int], nodes: Sequence[str]) -> list[int]:
    """Sorted by node, and the nodes with the most of them first: what spans bundles then spans few nodes."""
    counts: dict[str, int] = {}
    for bundle in bundles:
        counts[nodes[bundle]] = counts.get(nodes[bundle], 0) + 1
    return sorted(bundles, key=lambda bundle: (-counts[nodes[bundle]], nodes[bundle], bundle))
