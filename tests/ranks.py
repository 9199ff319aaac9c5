"""Groups of trainer ranks.

DeepSpeed joins a process group once a process, so all single-rank workers of a test process share one world,
and worlds of several ranks live in processes of their own (`run_ranks`).
"""

from __future__ import annotations

import functools
import os
import pickle
import random
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed
import torch.multiprocessing

from rlhf_ray.config.schema import OptimizerSection, TrainingSection
from rlhf_ray.engines.deepspeed_engine import World
from rlhf_ray.workers.model_worker import WorkerSpec

T = TypeVar("T")
EXACT = TrainingSection(precision="float32", zero_stage=0)


@functools.cache
def single_world() -> World:
    """The world of one rank that all workers of this process share."""
    return World(rank=0, size=1, master=f"127.0.0.1:{quiet_port()}", threads=1, use_gpu=False)


def quiet_port() -> int:
    """A free port below those that the system hands out: nobody takes it while the ranks start."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def worker_spec(
    training: TrainingSection = EXACT,
    optimizer: OptimizerSection | None = None,
    world: World | None = None,
    total_steps: int = 10,
    seed: int = 0,
) -> WorkerSpec:
    return WorkerSpec(
        optimizer or OptimizerSection(learning_rate=1e-3),
        training,
        world or single_world(),
        total_steps,
        seed,
    )


def run_ranks(function: Callable[..., T], size: int, folder: Path, *args: object) -> list[T]:
    """What `function(world, *args)` returns on each rank of a new world over gloo.

    Args:
        function: of a module, so that other processes can import it. folder: for the results.
    """
    master = f"127.0.0.1:{quiet_port()}"
    torch.multiprocessing.spawn(_rank, (function, size, master, folder, args), nprocs=size)
    return [pickle.loads((folder / f"rank-{rank}.pickle").read_bytes()) for rank in range(size)]


def _rank(
    rank: int, function: Callable[..., object], size: int, master: str, folder: Path, args: tuple
) -> None:
    torch.set_num_threads(1)
    result = function(World(rank, size, master, threads=1, use_gpu=False), *args)
    (folder / f"rank-{rank}.pickle").write_bytes(pickle.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # Gloo's threads may outlive the interpreter; the C++ library then aborts a process that has done well.
    os._exit(0)
