"""A batch script for Slurm: `ray symmetric-run` starts Ray on every node and the driver on the first."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from launch.manifests.nodes import Start

HEAD_PORT = 6379


@dataclass(frozen=True)
class Batch:
    """
    Fields:
        time: limit, as Slurm writes it: 1-12:00:00. partition, account: of the site.
        setup: shell commands before anything of this project is found, one a line.
    """

    time: str | None = None
    partition: str | None = None
    account: str | None = None
    setup: Sequence[str] = ()


def script(start: Start, batch: Batch) -> str:
    nodes = start.nodes
    directives = {
        "job-name": start.name,
        "nodes": nodes.count,
        "ntasks-per-node": 1,
        "cpus-per-task": nodes.cpus,
        "mem": f"{nodes.memory_gib}G",
        "gpus-per-node": nodes.gpus or None,
        "time": batch.time,
        "partition": batch.partition,
        "account": batch.account,
        "output": "%x-%j.log",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in directives.items() if value is not None]
    gpus = f" --num-gpus {nodes.gpus}"
    return f"""\
#!/bin/bash
{chr(10).join(lines)}
# One Ray a node, and what Slurm requeues goes on from its last checkpoint.
#SBATCH --exclusive
#SBATCH --requeue

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
{"".join(f"{line}{chr(10)}" for line in batch.setup)}
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head_address=$(srun --nodes=1 --ntasks=1 --nodelist="$head_node" hostname --ip-address)
head_address=${{head_address%% *}}

# Other users of these machines cannot join this Ray; srun hands the token to every node.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
export RAY_AUTH_TOKEN
# Seconds that the nodes have to find each other.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600

srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \\
    ray symmetric-run --address "$head_address:{HEAD_PORT}" --min-nodes "$SLURM_JOB_NUM_NODES" \\
    --num-cpus "$SLURM_CPUS_PER_TASK"{gpus} \\
    -- {shlex.join(start.command)}
"""
