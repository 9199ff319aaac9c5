"""`rlhf-ray cluster`: files that start a cluster of the size that a configuration wants."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from launch.commands.shared import AddCommand, add_config, load, not_negative, positive
from launch.exit_codes import DONE
from rlhf_ray.errors import ConfigError, UserError

if TYPE_CHECKING:
    from launch.manifests.kuberay import Pods
    from launch.manifests.nodes import Nodes
    from rlhf_ray.config.schema import RunConfig

MOUNT_PATH = "/shared"
OPTIONS = {
    "kuberay": {"image", "volume_claim", "mount_path", "secret", "max_retries"},
    "raycluster": {"image", "volume_claim", "mount_path", "secret"},
    "slurm": {"time", "partition", "account", "setup"},
    "autoscaler": {
        "image",
        "provider",
        "head_ip",
        "worker_ip",
        "region",
        "instance_type",
        "ssh_user",
        "setup",
    },
}
"""Kind -> the options, beside those of all kinds, that it has a use for."""


def add(command: AddCommand) -> None:
    cluster = command("cluster", _cluster, "Print a file that starts a cluster for a configuration.")
    cluster.add_argument(
        "kind",
        choices=tuple(OPTIONS),
        help="a KubeRay RayJob or RayCluster, a Slurm script, or a cluster file of Ray's autoscaler",
    )
    add_config(cluster)

    def option(
        name: str, about: str, kind: Callable[[str], object] = str, metavar: str | None = None
    ) -> None:
        cluster.add_argument(name, help=about, type=kind, metavar=metavar)

    option("--nodes", "machines that the roles run on", positive, "N")
    option("--gpus-per-node", "0 for none", not_negative, "N")
    option("--cpus-per-node", "default: 8 a GPU", positive, "N")
    option("--memory-per-node", "GiB; default: 64 a GPU", positive, "GIB")
    option("--name", "of the cluster or job; default: from the configuration's")
    option("--output", "write to a file instead of printing", Path, "FILE")
    option("--image", "Kubernetes, autoscaler: a container image with this project and its requirements")
    option("--volume-claim", "Kubernetes: a claim that all pods mount, for models, data and outputs")
    option("--mount-path", f"Kubernetes: where they mount it; default: {MOUNT_PATH}")
    option("--secret", "Kubernetes: a Secret whose entries become environment variables")
    option("--max-retries", "kuberay: how often a failed run goes on, on a new cluster", not_negative, "N")
    option("--time", "Slurm: the limit, such as 1-12:00:00")
    option("--partition", "Slurm")
    option("--account", "Slurm")
    cluster.add_argument(
        "--setup",
        action="append",
        metavar="COMMAND",
        help="Slurm, autoscaler: a shell command on each node before Ray starts, such as activating its "
        "environment",
    )
    cluster.add_argument("--provider", choices=("local", "aws"), help="autoscaler; default: local")
    option("--head-ip", "autoscaler, local: the machine that `ray up` makes the head", metavar="ADDRESS")
    cluster.add_argument(
        "--worker-ip", action="append", metavar="ADDRESS", help="autoscaler, local: each other machine"
    )
    option("--region", "autoscaler, aws; default: us-west-2")
    option("--instance-type", "autoscaler, aws: of the nodes with the roles")
    option("--ssh-user", "autoscaler; default: ubuntu")


def _cluster(arguments: argparse.Namespace) -> int:
    kind = arguments.kind
    for name in sorted(set().union(*OPTIONS.values()) - OPTIONS[kind]):
        if getattr(arguments, name) is not None:
            raise UserError(f"cluster {kind} has no use for --{name.replace('_', '-')}")
    volumes = [Path(arguments.mount_path or MOUNT_PATH)] if kind in ("kuberay", "raycluster") else []
    # Whether the run's folder is free is not to be seen here.
    config = load(arguments, "resume=auto", elsewhere=volumes)

    from launch.manifests.nodes import size

    nodes = size(
        config,
        nodes=arguments.nodes if kind != "autoscaler" else arguments.nodes or _given_machines(arguments),
        gpus_per_node=arguments.gpus_per_node,
        cpus_per_node=arguments.cpus_per_node,
        memory_per_node=arguments.memory_per_node,
    )
    text = RENDER[kind](arguments, config, nodes)
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")
    return DONE


def _kuberay(arguments: argparse.Namespace, config: RunConfig, nodes: Nodes) -> str:
    from launch.manifests import kuberay
    from launch.manifests.nodes import start
    from rlhf_ray.config.loading import read_text

    pods = _pods(arguments)
    if pods.claim is None:
        raise UserError(
            "cluster kuberay: what a run writes is lost with its pods; name a volume with --volume-claim"
        )
    _refuse_local_files(config, pods.mount)
    output_dir = Path(pods.mount) / config.output_dir
    if not output_dir.is_relative_to(pods.mount):
        raise UserError(
            f"output_dir={config.output_dir}: is lost with its pod; choose one below {pods.mount}, where the "
            "volume is, or name another --mount-path"
        )
    extra = [f"output_dir={output_dir}"]
    retries = arguments.max_retries or 0
    if retries:
        extra.append("resume=auto")  # every retry runs the same command
    path = f"{kuberay.CONFIG_FOLDER}/{kuberay.CONFIG_FILE}"
    named = start(path, arguments.overrides, nodes, arguments.name or _name(arguments), extra)
    return _yaml(kuberay.ray_job(named, pods, read_text(arguments.config), retries))


def _raycluster(arguments: argparse.Namespace, config: RunConfig, nodes: Nodes) -> str:
    from launch.manifests import kuberay
    from launch.manifests.nodes import start

    named = start(arguments.config, arguments.overrides, nodes, arguments.name, ())
    return _yaml([kuberay.ray_cluster(named, _pods(arguments))])


def _slurm(arguments: argparse.Namespace, config: RunConfig, nodes: Nodes) -> str:
    from launch.manifests import slurm
    from launch.manifests.nodes import start

    batch = slurm.Batch(arguments.time, arguments.partition, arguments.account, tuple(arguments.setup or ()))
    named = start(arguments.config, arguments.overrides, nodes, arguments.name, ["resume=auto"])
    return slurm.script(named, batch)


def _autoscaler(arguments: argparse.Namespace, config: RunConfig, nodes: Nodes) -> str:
    from launch.manifests import autoscaler

    name = arguments.name or _name(arguments)
    machines = autoscaler.Machines(
        arguments.ssh_user or "ubuntu", tuple(arguments.setup or ()), arguments.image
    )
    if arguments.provider == "aws":
        if arguments.instance_type is None:
            raise UserError("cluster autoscaler: which machines? name them with --instance-type")
        region = arguments.region or "us-west-2"
        tree = autoscaler.on_aws(name, machines, nodes, region, arguments.instance_type)
    else:
        workers = arguments.worker_ip or []
        if arguments.head_ip is None or len(workers) + 1 < nodes.count:
            raise UserError(
                f"cluster autoscaler: the run wants {nodes.count} machines, and "
                f"{len(workers) + (arguments.head_ip is not None)} are named; say their addresses with "
                "--head-ip and --worker-ip, or use --provider aws"
            )
        tree = autoscaler.on_premise(name, machines, arguments.head_ip, workers)
    return _yaml([tree])


RENDER: dict[str, Callable[[argparse.Namespace, RunConfig, Nodes], str]] = {
    "kuberay": _kuberay,
    "raycluster": _raycluster,
    "slurm": _slurm,
    "autoscaler": _autoscaler,
}


def _given_machines(arguments: argparse.Namespace) -> int | None:
    return 1 + len(arguments.worker_ip or []) if arguments.head_ip else None


def _name(arguments: argparse.Namespace) -> str:
    from launch.manifests.nodes import name_of

    return name_of(arguments.config)


def _pods(arguments: argparse.Namespace) -> Pods:
    from launch.manifests.kuberay import Pods

    if arguments.image is None:
        raise UserError(
            f"cluster {arguments.kind}: which image? name one that has this project and its requirements, "
            "with --image"
        )
    return Pods(
        arguments.image,
        metadata.version("ray"),
        arguments.volume_claim,
        arguments.mount_path or MOUNT_PATH,
        arguments.secret,
    )


def _refuse_local_files(config: RunConfig, mount: str) -> None:
    """A pod has the hub and the volume, and no file of this machine."""
    from launch.submission.named_files import named_files
    from rlhf_ray.config.document import dotted

    local = [file for file in named_files(config, None, [Path(mount)]) if not file.target.is_absolute()]
    if local:
        raise ConfigError(
            *(
                f"{dotted(file.key)}={file.value}: is on this machine, where no pod sees it; put it on the "
                f"volume and write its path there, below {mount}, or put it on the hub"
                for file in local
            )
        )


def _yaml(documents: Sequence[Mapping[str, object]]) -> str:
    import yaml

    return str(yaml.safe_dump_all(documents, sort_keys=False, width=110))
