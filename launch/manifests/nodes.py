"""How many machines a configuration wants, and of which size."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rlhf_ray.config.schema import ConstitutionAnnotator, OnlineSection, RoleSection, RunConfig
from rlhf_ray.config.schema.preference import USED_BY
from rlhf_ray.errors import UserError

USUAL_GPUS = 8
"""Of a node, where nobody says."""
CPUS_PER_GPU, GIB_PER_GPU = 8, 64
"""Of a node, where nobody says; one without a GPU is counted as one with a single GPU."""


@dataclass(frozen=True)
class Nodes:
    """
    Fields:
        count: nodes that the roles run on. gpus, cpus, memory_gib: of each of them.
    """

    count: int
    gpus: int
    cpus: int
    memory_gib: int


@dataclass(frozen=True)
class Start:
    """A run, and what it is started with.

    Fields:
        name: of the cluster or job: lower-case letters, digits and dashes.
        command: of the driver, word by word. nodes: it runs on.
    """

    name: str
    command: tuple[str, ...]
    nodes: Nodes


def start(
    config: str, overrides: Sequence[str], nodes: Nodes, name: str | None, extra: Sequence[str]
) -> Start:
    """Args: extra: overrides of ours, after the person's own."""
    words = ("python", "-m", "launch", "train", config, *overrides, *extra, "cluster.address=auto")
    return Start(name or name_of(config), words, nodes)


def name_of(config: str) -> str:
    """Kubernetes takes few characters, and begins with a letter."""
    stem = re.sub(r"[^a-z0-9]+", "-", Path(config).stem.lower()).strip("-")
    return f"rlhf-ray-{stem}"[:40].rstrip("-")


def size(
    config: RunConfig,
    *,
    nodes: int | None,
    gpus_per_node: int | None,
    cpus_per_node: int | None,
    memory_per_node: int | None,
) -> Nodes:
    """What the placement asks for, where it says numbers; else what the options say.

    Raises:
        UserError: neither says it, or the options are less than the placement asks for.
    """
    wanted = 0.0 if _works_without(config, gpus_per_node) else gpus_wanted(config)
    if wanted is None and (nodes is None or gpus_per_node is None):
        raise UserError(
            f"placement: does not say how many GPUs the run has (auto for {', '.join(_auto(config))}); "
            "say it with --nodes and --gpus-per-node, which may be 0, or write placement.<role>.gpus"
        )
    if gpus_per_node is None:
        gpus_per_node = min(USUAL_GPUS, math.ceil(wanted or 0))
    if nodes is None:
        nodes = max(1, math.ceil((wanted or 0) / max(1, gpus_per_node)))
    if wanted is not None and nodes * gpus_per_node < wanted:
        raise UserError(
            f"placement: asks for {wanted:g} GPUs, and {nodes} x {gpus_per_node} are "
            f"{nodes * gpus_per_node}; raise --nodes or --gpus-per-node, or lower placement.<role>.count "
            "or gpus"
        )
    units = max(1, gpus_per_node)
    return Nodes(
        nodes,
        gpus_per_node,
        cpus_per_node or CPUS_PER_GPU * units,
        memory_per_node or GIB_PER_GPU * units,
    )


def gpus_wanted(config: RunConfig) -> float | None:
    """Of those that work together and take most; None where none are shared and a role's are `auto`."""
    if config.placement.mode != "auto":
        return max(sum(_pools(config, roles).values()) for roles in _together(config))
    if _auto(config):
        return None
    sections = [[_section(config, role) for role in roles] for roles in _together(config)]
    return max(sum(section.count * float(section.gpus) for section in each) for each in sections)


def _pools(config: RunConfig, roles: Sequence[str]) -> dict[str, int]:
    """Devices of each pool of roles that share them: as many as the largest of its roles has. What a role
    writes as `gpus` is then a part of a device, and makes no more of them."""
    sizes: dict[str, int] = {}
    for role in roles:
        width = config.engine.tensor_parallel_size if config.placement.is_engine(role) else 1
        pool = config.placement.pool_of(role)
        sizes[pool] = max(sizes.get(pool, 0), _section(config, role).count * width)
    return sizes


def _works_without(config: RunConfig, gpus_per_node: int | None) -> bool:
    """Roles that share devices share the cores where there are no GPUs."""
    return gpus_per_node == 0 and config.placement.mode != "auto"


def _auto(config: RunConfig) -> list[str]:
    """The roles in use whose GPUs are shared out when the cluster is there."""
    used = dict.fromkeys(role for roles in _together(config) for role in roles)
    return [role for role in used if _section(config, role).gpus == "auto"]


def _section(config: RunConfig, role: str) -> RoleSection:
    return cast(RoleSection, getattr(config.placement, role))


def _together(config: RunConfig) -> Iterator[list[str]]:
    """The roles that hold resources at the same time, for each part of the run."""
    for stage in config.stages:
        if stage == "online" and config.online is not None:
            yield _online_roles(config, config.online)
        elif stage == "preferences" and config.preferences is not None:
            annotators = config.preferences.annotators
            judges = [a for a in annotators if isinstance(a, ConstitutionAnnotator) and a.model]
            yield ["engine", *(["feedback"] if judges else [])]
        elif stage == "preference" and config.preference is not None:
            preference = config.preference
            uses_reference = preference.algorithm in USED_BY["reference"]
            if uses_reference and preference.cache_reference:
                yield from (["reference"], ["policy"])
            else:
                yield ["policy", *(["reference"] if uses_reference else [])]
        elif stage == "constitution":
            yield from (["engine"], ["policy"])
        else:
            yield ["policy"]


def _online_roles(config: RunConfig, online: OnlineSection) -> list[str]:
    has_adapters = config.training.lora is not None and online.reference is None
    used = {
        "critic": online.uses_critic,
        "reference": online.uses_reference and not has_adapters,
        "judge": any(reward.type == "judge" for reward in online.rewards),
    }
    return ["policy", "engine", "reward", *(role for role, is_used in used.items() if is_used)]
