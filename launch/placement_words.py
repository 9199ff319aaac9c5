"""What a person is told when the cluster does not have what a placement asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import ray
from ray._private.state import available_resources_per_node

from launch.placement_layout import Pool

GIB = 1 << 30
KINDS = ("CPU", "GPU", "memory")


@dataclass(frozen=True)
class Node:
    """Fields: total, free: CPUs, GPUs and bytes of memory."""

    name: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


def nodes_of_cluster() -> list[Node]:
    """Those that are alive."""
    free = available_resources_per_node()
    return [
        Node(node["NodeName"], node["Resources"], free.get(node["NodeID"], {}), node.get("Labels") or {})
        for node in ray.nodes()
        if node["Alive"]
    ]


def has_labels(node: Node, wanted: Mapping[str, str]) -> bool:
    """By Ray's rules: `value`, `!value`, `in(a, b)`, `!in(a, b)`."""
    for key, condition in wanted.items():
        value, negated = node.labels.get(key), condition.startswith("!")
        bare = condition.removeprefix("!")
        listed = bare[3:-1].split(",") if bare.startswith("in(") and bare.endswith(")") else [bare]
        if (value in [name.strip() for name in listed]) == negated:
            return False
    return True


def never(pools: Sequence[Pool], nodes: Sequence[Node]) -> Iterator[str]:
    """What is missing even when the cluster is empty, most general first."""
    bundles = [
        (bundle, labels) for pool in pools for bundle, labels in zip(pool.bundles, pool.labels, strict=True)
    ]
    totals = {kind: sum(node.total.get(kind, 0.0) for node in nodes) for kind in KINDS}
    lacking = []
    for kind in KINDS:
        asked = sum(bundle.get(kind, 0.0) for bundle, _ in bundles)
        if asked > totals[kind] + 1e-6:
            lacking.append(f"{amount(kind, asked - totals[kind])} more")
    if lacking:
        yield ", ".join(lacking)
    said: list[object] = []
    for bundle, labels in bundles:
        fitting = [node for node in nodes if has_labels(node, labels)]
        if not fitting and labels not in said:
            said.append(labels)
            yield f"a node with the labels {_labels(labels)} (nodes have {_known(labels, nodes)})"
        is_said = not fitting or lacking or bundle in said
        if not is_said and not any(_fits(bundle, node.total) for node in fitting):
            said.append(bundle)
            yield f"a single node with {amounts(bundle)}"
    for pool in pools:
        hosts = sum(any(has_labels(node, labels) for labels in pool.labels) for node in nodes)
        if pool.strategy == "STRICT_SPREAD" and hosts < len(pool.bundles):
            yield f"{len(pool.bundles) - hosts} more nodes for {_roles(pool)}, each of which takes one"
        if pool.strategy == "STRICT_PACK":
            whole = {kind: sum(bundle.get(kind, 0.0) for bundle in pool.bundles) for kind in KINDS}
            if not lacking and not any(_fits(whole, node.total) for node in nodes):
                yield f"a single node with {amounts(whole)} for all of {_roles(pool)} (STRICT_PACK)"


def fragments(nodes: Sequence[Node]) -> str:
    """What is free on each node, in a few words."""
    listed = [
        f"{node.name} " + ", ".join(_free(kind, node) for kind in KINDS if node.total.get(kind))
        for node in nodes[:8]
    ]
    more = f"; and {len(nodes) - 8} more nodes" if len(nodes) > 8 else ""
    return f"free on each node: {'; '.join(listed)}{more}"


def amounts(bundle: Mapping[str, float]) -> str:
    return ", ".join(amount(kind, bundle[kind]) for kind in KINDS if bundle.get(kind))


def amount(kind: str, number: float) -> str:
    if kind == "memory":
        return f"{number / GIB:.1f} GiB memory"
    return f"{number:g} {kind}"


def _free(kind: str, node: Node) -> str:
    unit = GIB if kind == "memory" else 1
    of = f"{node.total[kind] / unit:.1f} GiB memory" if kind == "memory" else f"{node.total[kind]:g} {kind}"
    return f"{node.free.get(kind, 0.0) / unit:.3g} of {of}"


def _fits(bundle: Mapping[str, float], room: Mapping[str, float]) -> bool:
    return all(wanted <= room.get(kind, 0.0) + 1e-6 for kind, wanted in bundle.items())


def _labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())


def _known(labels: Mapping[str, str], nodes: Sequence[Node]) -> str:
    found = {f"{key}={node.labels[key]}" for key in labels for node in nodes if key in node.labels}
    return ", ".join(sorted(found)) or f"none called {', '.join(labels)}"


def _roles(pool: Pool) -> str:
    return ", ".join(pool.seats)
