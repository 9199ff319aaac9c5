"""`rlhf-ray plan`: whether a configuration fits on given devices, and how long a step takes."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from launch.commands.shared import AddCommand, add_config, positive
from rlhf_ray.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from rlhf_ray.config.schema import RunConfig
    from rlhf_ray.planning.plan import Machine, Plan

ABOUT = (
    "Say how much memory every device needs, where the roles are, how long a step takes, and what to change "
    "if it does not fit; nothing is started. Without --gpus, for this machine's CPU. "
    "Exit code: 0 it fits, 1 it does not, 2 the input is wrong."
)
FITS, DOES_NOT_FIT = 0, 1


def add(command: AddCommand) -> None:
    plan = command("plan", run, ABOUT)
    add_config(plan)
    plan.add_argument("--gpus", type=positive, metavar="N", help="of the whole cluster")
    plan.add_argument("--gpu", default="H100", metavar="NAME", help="whose data sheet counts (%(default)s)")
    plan.add_argument("--gpu-memory", type=float, metavar="GIB", help="of each; default: the data sheet's")
    plan.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="(%(default)s)")
    plan.add_argument("--stage", metavar="NAME", help="to plan; default: online, or the last")
    plan.add_argument(
        "--answer-length", type=float, metavar="TOKENS", help="mean; default: a third of the most"
    )
    plan.add_argument("--prompt-length", type=float, metavar="TOKENS", help="mean; default: half of the most")
    plan.add_argument(
        "--simulate", action="store_true", help="compare schedules on so many devices, step by step"
    )
    plan.add_argument("--json", type=Path, metavar="FILE", help="everything, for programs")


def run(arguments: argparse.Namespace) -> int:
    """
    Raises:
        ConfigError, ModelError: the input is wrong.
    """
    from rich.console import Console

    from launch.plan_text import show
    from rlhf_ray.planning.advice import advise
    from rlhf_ray.planning.plan import Assumed, make_plan

    config = _load(arguments)
    assumed = Assumed(arguments.answer_length, arguments.prompt_length)
    plan = make_plan(config, _machine(arguments), assumed, arguments.stage)
    advice = None if plan.fits else advise(plan)
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=140)
    show(plan, advice, console)
    simulated = _simulate(plan, console) if arguments.simulate else None
    if arguments.json is not None:
        record = _record(plan, [] if advice is None else list(advice.changes), simulated)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return FITS if plan.fits else DOES_NOT_FIT


def _load(arguments: argparse.Namespace) -> RunConfig:
    """
    Raises:
        ConfigError: with every mistake that planning minds; `check` has the others.
    """
    from rlhf_ray.config.loading import parse_document, read_document
    from rlhf_ray.config.parts import Parts
    from rlhf_ray.config.placement_checks import placement_mistakes

    document = read_document(arguments.config, arguments.overrides)
    config = parse_document(document)
    for path, sentence in placement_mistakes(Parts.of(document)):
        document.add(path, sentence)
    if config is None or document.mistakes:
        raise ConfigError(*document.mistakes)
    return config


def _machine(arguments: argparse.Namespace) -> Machine:
    import os

    import psutil

    from rlhf_ray.planning.hardware import cpu, gpu
    from rlhf_ray.planning.plan import Machine

    if arguments.gpus is None:
        cores = len(os.sched_getaffinity(0))
        return Machine(cpu(cores, psutil.virtual_memory().available), 1, 1)
    device = gpu(arguments.gpu).with_memory(arguments.gpu_memory)
    return Machine(device, arguments.gpus, min(arguments.gpus_per_node, arguments.gpus))


def _simulate(plan: Plan, console: Console) -> list[dict[str, object]]:
    from launch.plan_text import show_simulated
    from rlhf_ray.planning.schedules import fleet_of, simulate_all

    found = simulate_all(fleet_of(plan))
    show_simulated(plan, found, console)
    return [{"keys": each.keys, **asdict(each.schedule), **asdict(each.outcome)} for each in found]


def _record(plan: Plan, changes: list[str], simulated: list[dict[str, object]] | None) -> dict[str, object]:
    from rlhf_ray.planning.memory import KINDS

    return {
        "stage": plan.stage,
        "fits": plan.fits,
        "problems": list(plan.problems),
        "changes": changes,
        "roles": {
            memory.role: {
                "devices": [list(own) for own in plan.layout[memory.role].devices],
                "bytes": {kind: memory.of_kind(kind) for kind in KINDS},
                "peak": memory.peak,
                "host": memory.host,
            }
            for memory in plan.memories
        },
        "devices": [
            {"devices": list(device.devices), "peaks": dict(device.peaks), "capacity": device.capacity}
            for device in plan.devices
        ],
        "seconds": {f"{time.phase} {time.role}": time.seconds for time in plan.times},
        "step_seconds": plan.step,
        "simulated": simulated,
    }
