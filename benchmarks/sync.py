"""From "the policy has stepped" to "the engine samples with the new weights, verified", against a floor.

rlhf-ray bench sync

Ours is what a run does after a step: publish, then ask engine and trainer for the log-probs of a probe and
compare them. The floor is one copy of all weights into a flat message, one broadcast of it and vLLM's own
reload, with nothing announced or checked (`benchmarks/sync_floor.py`). After every sync of either arm the
probe has to show that the engine holds the new weights; for ours that is part of the time.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from actors.roles import RemotePolicy
from benchmarks.generation import thread_environment
from benchmarks.paired import Goal, Options, Result, compare, run_claim, single
from benchmarks.peer import Peer
from benchmarks.stage import model_folder, open_stage
from launch.memory import model_size
from launch.stages.context import StageContext
from launch.stages.generation import load_prompts
from launch.stages.online_roles import OnlineBuilder, OnlineModels, demands
from launch.stages.rewards import find_rewards
from rlhf_ray.config.schema import ModelSection
from rlhf_ray.engines.vllm_generator import ENVIRONMENT
from rlhf_ray.loops.online import OnlineRoles
from rlhf_ray.roles import Done
from rlhf_ray.types import Ragged, SFTBatch
from rlhf_ray.weights.verify import Probe, ProbeHistory

CLAIM = "sync"
GOAL = Goal("<=", 1.5)
PARTS = ("gather", "transfer", "load", "verify")
SHARE_OF_GPU = 0.25
STEP_SCALE = 1e-3
STEP_TOKENS = 16


@dataclass
class Ours:
    """Seconds of each publication, and of its parts."""

    roles: OnlineRoles
    probe: Ragged
    version: int = 0
    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    def __call__(self) -> float:
        """Raises: WeightSyncError if the engine does not hold the new weights."""
        tokens = Ragged.from_rows([self.probe[0][:STEP_TOKENS]], np.int32)
        is_target = tokens.with_values(np.arange(len(tokens.values)) > 0)
        self.roles.policy.train_sft(Done(SFTBatch(tokens, is_target))).result()
        self.version += 1
        start = time.perf_counter()
        metrics = self.roles.policy.publish(self.version, verify=True)
        total = time.perf_counter() - start
        sent = [metrics[f"time/sync_{part}"] for part in PARTS[:-1]]
        for part, seconds in zip(PARTS, [*sent, total - sum(sent)], strict=True):
            self.parts[part].append(seconds)
        return total


@dataclass
class Floor:
    trainer: Peer
    engine: Peer
    probe: Ragged
    history: ProbeHistory
    shares_gpu: bool
    version: int = 0

    def __call__(self) -> float:
        """Raises: WeightSyncError if the engine does not hold the new weights."""
        self.trainer.call("step", self.version, STEP_SCALE).result()
        self.version += 1
        start = time.perf_counter()
        sending = self.trainer.call("send")
        if self.shares_gpu:
            sending.result()
        receiving = self.engine.call("receive")
        if not self.shares_gpu:
            sending.result()
        receiving.result()
        seconds = time.perf_counter() - start
        self.check()
        return seconds

    def check(self) -> None:
        scored = self.engine.call("token_logprobs", self.probe).result()
        own = self.trainer.call("probe", self.probe).result()
        self.history.check(Probe(engine=scored, trainer=own))


@contextmanager
def our_roles(context: StageContext) -> Iterator[tuple[OnlineRoles, Ragged, int]]:
    """The roles of a run, connected; the probe on which they are compared; threads of the engine."""
    section = context.config.online
    assert section is not None
    model = context.model("model", section.model)
    models = OnlineModels(model, model, find_rewards(context, section, model))
    prompts = load_prompts(context, section.dataset, context.formatter(model), section.max_prompt_length)
    with context.placement(demands(context, models)) as placement:
        roles = OnlineBuilder(context, placement, models).build(prompts)
        assert isinstance(roles.policy, RemotePolicy) and roles.policy.probe is not None
        yield roles, roles.policy.probe, placement.shares["engine"].threads


@contextmanager
def floor(context: StageContext, model: Path, probe: Ragged, threads: int, logs: Path) -> Iterator[Floor]:
    num_gpus = torch.cuda.device_count()
    backend = ("gloo", "ipc", "nccl")[min(num_gpus, 2)]
    threaded = thread_environment(threads)
    devices = [{"CUDA_VISIBLE_DEVICES": str(min(rank, num_gpus - 1))} if num_gpus else {} for rank in (0, 1)]
    engine_section = context.config.engine
    shared = {"model": str(model), "threads": threads}
    with (
        Peer(
            "benchmarks.sync_floor:FloorTrainer",
            {**shared, "dtype": engine_section.number_format},
            log=logs / "floor-trainer.log",
            environment=threaded | devices[0],
        ) as trainer,
        Peer(
            "benchmarks.sync_floor:FloorEngine",
            {**shared, "section": engine_section, "max_model_len": int(probe.lengths.max()) + 1},
            log=logs / "floor-engine.log",
            environment=ENVIRONMENT | threaded | devices[1],
        ) as engine,
    ):
        layout = trainer.call("layout").result()
        handle = trainer.call("handle").result() if backend == "ipc" else None
        port = free_port()
        joining = trainer.call("connect", port, backend)
        engine.call("connect", port, backend, layout, handle).result()
        joining.result()
        arm = Floor(trainer, engine, probe, ProbeHistory(context.config.sync.tolerance), backend == "ipc")
        arm.check()
        yield arm


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def measure(options: Options) -> list[Result]:
    folder = model_folder(options.model)
    size = model_size(ModelSection(path=str(folder)))
    overrides = [
        f"engine.gpu_memory_utilization={SHARE_OF_GPU}",
        # The steps here are of one short row: no memory has to be kept for a large batch.
        "training.tokens_per_micro_batch=1024",
    ]
    with (
        open_stage(folder, options.folder / "run", overrides) as context,
        our_roles(context) as (roles, probe, threads),
        floor(context, folder, probe, threads, options.folder) as baseline,
    ):
        roles.policy.publish(0, verify=True)
        ours = Ours(roles, probe)
        result = compare(
            CLAIM,
            ours,
            baseline,
            unit="s",
            goal=GOAL,
            pairs=options.pairs,
            warmups=options.warmups,
            say=options.say,
            notes={
                "model": options.model,
                "parameters": size.parameters,
                "threads": threads,
                "probe_tokens": int((probe.lengths - 1).sum()),
            },
        )
        split = [
            single(CLAIM, seconds[options.warmups :], unit="s", case=part)
            for part, seconds in ours.parts.items()
        ]
        return [result, unverified(result, ours.parts["verify"][options.warmups :]), *split]


def unverified(result: Result, verify: Sequence[float]) -> Result:
    """The same runs without the time that ours took to look whether it worked; the floor does not look."""
    sent = [total - seconds for total, seconds in zip(result.ours, verify, strict=True)]
    figures = [a / b for a, b in zip(sent, result.baseline, strict=True)]
    return replace(result, case="unverified", ours=sent, figures=figures, goal=None)


def main(argv: Sequence[str] | None = None) -> int:
    return run_claim(CLAIM, __doc__, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
