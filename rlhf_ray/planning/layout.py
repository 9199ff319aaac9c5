"""Which actor is on which devices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.config.schema import PlacementSection


@dataclass(frozen=True)
class Wanted:
    """Fields: count: actors. width: devices of each. share: of a device, where the configuration says so."""

    role: str
    count: int
    width: int = 1
    share: float | None = None
    is_apart: bool = False


@dataclass(frozen=True)
class Placed:
    """Fields: devices: of each actor, as numbers that count through all nodes."""

    role: str
    devices: tuple[tuple[int, ...], ...]

    @property
    def all_devices(self) -> frozenset[int]:
        return frozenset(device for own in self.devices for device in own)


@dataclass(frozen=True)
class Layout:
    """
    Fields:
        missing: devices that the placement asks for beyond those there are.
        moves_out: roles that wait give their memory back (modes colocated and disaggregated).
    """

    placed: tuple[Placed, ...]
    num_devices: int
    per_node: int
    moves_out: bool
    missing: int = 0

    def __getitem__(self, role: str) -> Placed:
        return next(each for each in self.placed if each.role == role)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(each.role for each in self.placed)

    def on(self, device: int) -> tuple[str, ...]:
        """Roles on a device, one as often as it has actors there."""
        return tuple(each.role for each in self.placed for own in each.devices if device in own)

    def share(self, left: str, right: str) -> bool:
        """Whether they have a device in common, and must take turns there."""
        return bool(self[left].all_devices & self[right].all_devices)

    def alike(self) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
        """Devices that hold the same roles, with these roles."""
        groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for device in range(self.num_devices):
            groups[self.on(device)].append(device)
        return [(tuple(devices), roles) for roles, devices in groups.items()]

    def spans_nodes(self, role: str) -> bool:
        return len({device // self.per_node for device in self[role].all_devices}) > 1


def lay_out(wanted: Sequence[Wanted], placement: PlacementSection, num_devices: int, per_node: int) -> Layout:
    """
    In the mode `auto` every actor has devices of its own where there are enough of them, and else as many as
    fit share each; engines that work while the others do keep theirs.
    """
    if placement.mode == "auto":
        return _auto(wanted, num_devices, per_node)
    pools: dict[str, list[Wanted]] = defaultdict(list)
    for each in wanted:
        pools[placement.pool_of(each.role)].append(each)
    placed, start = [], 0
    for pool in pools.values():
        size = max(each.count * each.width for each in pool)
        placed += _side_by_side(pool, start, size)
        start += size
    missing = max(0, start - num_devices)
    return Layout(
        _in_order(wanted, placed), max(num_devices, start), per_node, moves_out=True, missing=missing
    )


def _auto(wanted: Sequence[Wanted], num_devices: int, per_node: int) -> Layout:
    whole = [each for each in wanted if each.share is None or each.share >= 1]
    asked = sum(each.count * each.width for each in whole)
    parts = [each for each in wanted if each not in whole]
    if asked + (1 if parts else 0) <= num_devices:
        placed, start = [], 0
        for each in whole:
            placed += _side_by_side([each], start, each.count * each.width)
            start += each.count * each.width
        placed += _side_by_side(parts, start, num_devices - start)
        return Layout(_in_order(wanted, placed), num_devices, per_node, moves_out=False)
    apart = [each for each in wanted if each.is_apart]
    together = [each for each in wanted if not each.is_apart]
    taken = sum(each.count * each.width for each in apart)
    widest = max((each.count * each.width for each in together), default=0)
    room = min(num_devices - taken, widest)
    size = max(1, room)
    if room < widest and not all(each.count * each.width <= size for each in together):
        size = max(size, max(each.width for each in together))
    placed = _side_by_side(together, 0, size)
    start = size
    for each in apart:
        placed += _side_by_side([each], start, each.count * each.width)
        start += each.count * each.width
    missing = max(0, start - num_devices)
    return Layout(
        _in_order(wanted, placed), max(num_devices, start), per_node, moves_out=False, missing=missing
    )


def _side_by_side(pool: Sequence[Wanted], start: int, size: int) -> list[Placed]:
    """All from the first device on, and round again where a role has more; single actors one further each,
    so that they do not meet on one device."""
    placed, next_single = [], 0
    for each in pool:
        offset = 0
        if each.count == 1 and each.width < size:
            offset, next_single = next_single, next_single + each.width
        devices = tuple(
            tuple(start + (offset + actor * each.width + part) % size for part in range(each.width))
            for actor in range(each.count)
        )
        placed.append(Placed(each.role, devices))
    return placed


def _in_order(wanted: Sequence[Wanted], placed: Sequence[Placed]) -> tuple[Placed, ...]:
    order = {each.role: index for index, each in enumerate(wanted)}
    return tuple(sorted(placed, key=lambda each: order[each.role]))
