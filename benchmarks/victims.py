"""Who can be killed: the processes that play a run's roles, and whole nodes of a cluster on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
from ray.cluster_utils import Cluster

from rlhf_ray.errors import DataError
from rlhf_ray.reporting.files import read_lines

T = TypeVar("T")
MIB = 1 << 20
PHASES = {
    "starting": {"build", "connect", "init_weight_transfer_engine", "load_state", "load_state_dict"},
    "checkpointing": {"save_state", "save_model", "state_dict"},
    "sync": {"publish", "probe", "token_logprobs"},
    "training": {"train_rl"},
    "scoring": {"score", "logprobs", "reference_logprobs", "values", "gather", "prepare"},
    "generation": {"generate"},
}
"""What a run is at -> the calls by which that is known. Where several are under way, the first; engines that
work ahead generate all the time."""
REPEATED = [phase for phase in PHASES if phase != "starting"]
"""Those that come again."""
BETWEEN = "between calls"
ATTEMPTS = 4
"""To start a node."""


def processes(run: Path) -> dict[str, int]:
    """Name of a role's actor (`policy`, `engine-1`) -> the process that plays it: the one that writes its
    log."""
    logs = (run / "logs").resolve()
    found = {}
    for process in psutil.process_iter():
        try:
            if not process.name().startswith("ray::"):
                continue
            log = Path(os.readlink(f"/proc/{process.pid}/fd/1"))
        except (psutil.NoSuchProcess, OSError):
            continue  # it ended while we looked
        if log.parent == logs:
            found[log.stem] = process.pid
    return found


def phase(there: Iterable[int]) -> str:
    """What a run is at whose roles these processes play. Ray names a process after the call that it is at,
    `ray::policy.train_rl`."""
    calls = set()
    for process in there:
        with suppress(psutil.NoSuchProcess, IndexError):
            calls.add(psutil.Process(process).cmdline()[0].rpartition(".")[2])
    return next((phase for phase, own in PHASES.items() if own & calls), BETWEEN)


def kill(process: int) -> bool:
    """SIGKILL. Returns whether it was there."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    try:
        return len(read_lines(path)) if path.exists() else 0
    except DataError:
        return 0  # a line is half written


def patiently(start: Callable[[], T]) -> T:
    """Start a node. Ray waits half a minute for it, which is too little where the machine is busy; what has
    started by then is ended, and starts anew."""
    before = psutil.Process().children()
    for _ in range(ATTEMPTS - 1):
        try:
            return start()
        except Exception:
            for left in psutil.Process().children():
                if left not in before:
                    left.kill()
    return start()


@dataclass
class Nodes:
    """A head that only keeps the books, and nodes of two CPUs that do the work."""

    cluster: Cluster

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> None:
        patiently(lambda: self.cluster.add_node(num_cpus=2, memory=8192 * MIB, object_store_memory=150 * MIB))

    def kill(self, number: int) -> None:
        """Every process of a node, at the same moment."""
        nodes = sorted(self.cluster.worker_nodes, key=lambda node: str(node.unique_id))
        self.cluster.remove_node(nodes[number % len(nodes)], allow_graceful=False)


@contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    # Ray puts sockets there, whose paths may have no more than 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    head = {
        "num_cpus": 0,
        "temp_dir": str(folder),
        "include_dashboard": False,
        "object_store_memory": 150 * MIB,
        # Ray's own choice takes half a minute to miss a machine.
        "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 3},
    }
    cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False))
    made = Nodes(cluster)
    try:
        for _ in range(count):
            made.add()
        yield made
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
