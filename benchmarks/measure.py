"""What the scripts here share: a command's wall time and the memory of all its processes, and where results
go."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil
from rich.console import Console
from rich.table import Table

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.reporting.metrics_log import RunResult, load_run

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Result = TypeVar("Result", bound="DataclassInstance")
GIB = 1 << 30


@dataclass(frozen=True)
class Measured:
    """seconds: wall time. peak_memory: largest sum over the process tree of proportional set sizes (shared
    pages are counted once), sampled every second or less often, in bytes."""

    exit_code: int
    seconds: float
    peak_memory: int


def run_measured(command: Sequence[str], log: Path) -> Measured:
    """Run a command with its output in a file; the tree is all processes that descend from it, Ray's
    included."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    peak = 0
    stop = threading.Event()
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process,
    ):

        def watch() -> None:
            # Looking walks the page tables of every process; it may take a fiftieth of the time at most.
            nonlocal peak
            pause = 1.0
            while not stop.wait(pause):
                looked = time.monotonic()
                peak = max(peak, tree_memory(process.pid))
                pause = max(1.0, 50 * (time.monotonic() - looked))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        exit_code = process.wait()
        stop.set()
        watcher.join()
    return Measured(exit_code, time.monotonic() - began, peak)


def tree_memory(pid: int) -> int:
    """Bytes that a process and its descendants take."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for process in tree:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended between listing and reading
    return total


def environment() -> dict[str, object]:
    """What the numbers depend on."""
    return {
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def write_json(path: Path | None, result: object) -> None:
    if path is not None:
        path.write_text(json.dumps({"environment": environment(), "result": result}, indent=2) + "\n")


def train_run(config: str, output: Path, overrides: Sequence[str]) -> tuple[Measured, RunResult]:
    """Run a packaged configuration as a user would, in a process of its own; one that is done is only read.

    Raises:
        RlhfRayError: the run failed; names its log.
    """
    log = output.with_name(f"{output.name}.log")
    words = [config, f"output_dir={output}", "resume=auto", *overrides]
    measured = run_measured([sys.executable, "-m", "launch", "train", *words], log)
    if measured.exit_code:
        raise RlhfRayError(f"{output} failed: see {log}")
    return measured, load_run(output)


def train_seed(config: str, seed: int, folder: Path, overrides: Sequence[str]) -> tuple[Measured, RunResult]:
    """`train_run` with a seed, in a folder of its own."""
    return train_run(config, folder / f"seed-{seed}", [f"seed={seed}", *overrides])


def run_seeds(
    args: argparse.Namespace,
    measure: Callable[[int, Path, Sequence[str]], Result],
    table: Callable[[Sequence[Result]], Table],
    overrides: Sequence[str],
) -> int:
    """Measure each seed, keep what is known after each of them, and print the table."""
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in args.seeds:
            results.append(measure(seed, args.folder or Path(temporary), overrides))
            write_json(args.json, [asdict(result) for result in results])  # a later seed may fail
    Console().print(table(results))
    return 0


def seeds_parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark over seeds; what is left over are overrides of the configuration."""
    parser = argparse.ArgumentParser(prog=f"rlhf-ray bench {name}", description=about)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    return parser
