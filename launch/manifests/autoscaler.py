"""A cluster file for Ray's own launcher, `ray up`: machines that are there, or those of a cloud."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.manifests.nodes import Nodes

Tree = dict[str, object]
HEAD_TYPE, WORKER_TYPE = "head", "worker"
HEAD_INSTANCE = "m5.2xlarge"
"""For the driver and Ray's servers, which want no GPU."""


@dataclass(frozen=True)
class Machines:
    """
    Fields:
        ssh_user: on all of them. setup: shell commands on each before Ray starts.
        image: a container in which everything runs, if any.
    """

    ssh_user: str
    setup: Sequence[str] = ()
    image: str | None = None


def on_premise(name: str, machines: Machines, head: str, workers: Sequence[str]) -> Tree:
    """Addresses of machines that are there; the head is one of those that the roles run on."""
    provider: Tree = {"type": "local", "head_ip": head, "worker_ips": list(workers)}
    return {
        **_common(name, machines, len(workers)),
        "provider": provider,
        "head_start_ray_commands": _head_commands(""),
        "worker_start_ray_commands": _worker_commands(),
    }


def on_aws(name: str, machines: Machines, nodes: Nodes, region: str, instance: str) -> Tree:
    """As many machines of a type as the roles need, and a small one for the driver."""
    worker: Tree = {
        "node_config": {"InstanceType": instance},
        "min_workers": nodes.count,
        "max_workers": nodes.count,
        "resources": {"CPU": nodes.cpus, **({"GPU": nodes.gpus} if nodes.gpus else {})},
    }
    head: Tree = {"node_config": {"InstanceType": HEAD_INSTANCE}, "resources": {"CPU": 0}}
    return {
        **_common(name, machines, nodes.count),
        "provider": {"type": "aws", "region": region, "cache_stopped_nodes": False},
        "available_node_types": {HEAD_TYPE: head, WORKER_TYPE: worker},
        "head_node_type": HEAD_TYPE,
        "head_start_ray_commands": _head_commands(" --num-cpus=0"),
        "worker_start_ray_commands": _worker_commands(),
    }


def _common(name: str, machines: Machines, max_workers: int) -> Tree:
    docker = {"image": machines.image, "container_name": name} if machines.image else {}
    return {
        "cluster_name": name,
        "max_workers": max_workers,
        "idle_timeout_minutes": 15,
        "auth": {"ssh_user": machines.ssh_user},
        "setup_commands": list(machines.setup),
        **({"docker": docker} if docker else {}),
        # Of the person who starts the cluster; `ray get-auth-token --generate` makes it.
        "file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token"},
    }


def _head_commands(options: str) -> list[str]:
    # The dashboard answers on the machine itself; `ray dashboard` makes a tunnel to it.
    return [
        "ray stop",
        "RAY_AUTH_MODE=token ray start --head --port=6379 --dashboard-host=127.0.0.1"
        f"{options} --autoscaling-config=~/ray_bootstrap_config.yaml",
    ]


def _worker_commands() -> list[str]:
    return ["ray stop", "RAY_AUTH_MODE=token ray start --address=$RAY_HEAD_IP:6379"]
