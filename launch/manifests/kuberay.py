"""Kubernetes objects for the KubeRay operator: a RayJob with its cluster, or a RayCluster to submit to.

The fields are those of KubeRay's API reference, https://docs.ray.io/en/latest/cluster/kubernetes/references/api.html
(`authOptions` since KubeRay 1.6).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from launch.manifests.nodes import Nodes, Start

API = "ray.io/v1"
CONFIG_FOLDER, CONFIG_FILE = "/etc/rlhf-ray", "config.yaml"
"""Where the head pod finds the configuration."""
SECONDS_KEPT = 3600
"""How long the pods of a run that is over stay, to look at their logs."""
HEAD = Nodes(count=1, gpus=0, cpus=2, memory_gib=8)
"""The driver and Ray's own servers; the roles run on the workers."""

Tree = dict[str, object]


@dataclass(frozen=True)
class Pods:
    """What all pods have in common.

    Fields:
        image: with this project and its requirements. claim: a volume claim that all of them mount at
            `mount`, for models, data and what runs write. secret: a Secret whose entries are environment
            variables of theirs.
    """

    image: str
    ray_version: str
    claim: str | None = None
    mount: str = "/shared"
    secret: str | None = None


def ray_cluster(start: Start, pods: Pods) -> Tree:
    return {
        "apiVersion": API,
        "kind": "RayCluster",
        "metadata": {"name": start.name},
        "spec": _cluster_spec(start, pods, config_map=None),
    }


def ray_job(start: Start, pods: Pods, config_text: str, max_retries: int) -> list[Tree]:
    """The configuration as a ConfigMap, and the job that reads it.

    Args:
        max_retries: each brings up a new cluster and runs the same command, which must say resume=auto.
    """
    config_map = f"{start.name}-config"
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": config_map},
            "data": {CONFIG_FILE: config_text},
        },
        {
            "apiVersion": API,
            "kind": "RayJob",
            "metadata": {"name": start.name},
            "spec": {
                "entrypoint": shlex.join(start.command),
                "backoffLimit": max_retries,
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": SECONDS_KEPT,
                "rayClusterSpec": _cluster_spec(start, pods, config_map),
            },
        },
    ]


def _cluster_spec(start: Start, pods: Pods, config_map: str | None) -> Tree:
    head = _pod("ray-head", HEAD, pods, config_map)
    return {
        "rayVersion": pods.ray_version,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            # No role is placed beside the driver.
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
            "template": head,
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": start.nodes.count,
                "minReplicas": start.nodes.count,
                "maxReplicas": start.nodes.count,
                "rayStartParams": {},
                "template": _pod("ray-worker", start.nodes, pods, None),
            }
        ],
    }


def _pod(name: str, size: Nodes, pods: Pods, config_map: str | None) -> Tree:
    # The object store, and the processes of an engine or a training group, talk through shared memory.
    volumes: list[Tree] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts: list[Tree] = [{"name": "shm", "mountPath": "/dev/shm"}]
    if pods.claim is not None:
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": pods.claim}})
        mounts.append({"name": "shared", "mountPath": pods.mount})
    if config_map is not None:
        volumes.append({"name": "config", "configMap": {"name": config_map}})
        mounts.append({"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True})
    container: Tree = {
        "name": name,
        "image": pods.image,
        "resources": {"requests": _amounts(size), "limits": _amounts(size)},
        "volumeMounts": mounts,
    }
    if pods.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": pods.secret}}]
    if name == "ray-head":
        ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
        container["ports"] = [{"name": port, "containerPort": number} for port, number in ports.items()]
    return {"spec": {"containers": [container], "volumes": volumes}}


def _amounts(size: Nodes) -> dict[str, str]:
    amounts = {"cpu": str(size.cpus), "memory": f"{size.memory_gib}Gi"}
    return amounts | ({"nvidia.com/gpu": str(size.gpus)} if size.gpus else {})
