"""The loop over many engines, against a model of itself: what do the driver, the queue and the sync cost?

rlhf-ray bench async-sim --json async-sim.json

The loop, the groups of actors and the control plane of the weight sync are the real ones, over Ray; the
engines sleep for as long as their answers take (long-tailed), the trainer for as long as an update takes. The
model knows these times and that everything else takes none, so the figure, predicted over measured seconds,
falls short of 1 by what the machinery costs.
"""

from __future__ import annotations

import heapq
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

import numpy as np
import ray

from actors.engine_calls import RemoteEngineCalls
from actors.group import ActorGroup
from actors.host import AsyncHost, Host
from actors.roles import (
    RemoteExperience,
    RemoteGenerator,
    RemotePolicy,
    RemoteScorer,
    RemoteStreamingGenerator,
)
from benchmarks.paired import Goal, Options, Result, run_claim, single
from benchmarks.sleepers import busy_seconds, seconds_of
from launch.placement import Placement, RoleDemand
from rlhf_ray.config.schema import ClusterSection, LoggingSection, OnlineSection, RoleSection, SyncSection
from rlhf_ray.data.cursor import Cursor
from rlhf_ray.loops.checkpoints import Checkpoints
from rlhf_ray.loops.online import OnlineLoop, OnlineRoles
from rlhf_ray.loops.stage_run import StageRun
from rlhf_ray.planning.lengths import long_tailed
from rlhf_ray.reporting.metrics_log import MetricsLog, read_metrics
from rlhf_ray.reporting.progress import QuietProgress
from rlhf_ray.reporting.run_folder import RunFolder
from rlhf_ray.types import Prompts, Ragged

GOAL = Goal(">=", 0.95)
SEED = 0
START_TIMEOUT = 600.0


@dataclass(frozen=True)
class Case:
    """
    Fields:
        groups_per_engine: prompts of a step for each engine, `slots` of which it answers at a time.
        answer: mean seconds of a group's answers. train, sync: seconds of an update and of taking weights.
    """

    num_engines: int
    max_lag: int
    num_steps: int = 8
    groups_per_engine: int = 4
    slots: int = 2
    answer: float = 0.5
    train: float = 2.0
    sync: float = 0.1

    @property
    def num_groups(self) -> int:
        return self.num_engines * self.groups_per_engine

    @property
    def name(self) -> str:
        return f"{self.num_engines} engines, lag {self.max_lag}"


def prompts_of(case: Case) -> Prompts:
    """As many as one pass has; the seconds of their answers are log-normal, with a tail of several times the
    mean."""
    count = case.num_groups * case.num_steps
    draws = long_tailed(np.random.default_rng(SEED), count)
    return Prompts(
        ids=np.arange(count),
        messages=(({"role": "user", "content": "?"},),) * count,
        token_ids=Ragged.from_rows([[1, 2]] * count, np.int32),
        columns=tuple({"seconds": case.answer * draw} for draw in draws.tolist()),
    )


def predicted_seconds(case: Case, batches: Sequence[Sequence[float]]) -> float:
    """Of all steps. batches: seconds of each group's answers, in the order in which they are asked for."""
    if case.max_lag == 0:
        shares = [np.array_split(np.array(batch), case.num_engines) for batch in batches]
        longest = [max(busy_seconds(share.tolist(), case.slots) for share in step) for step in shares]
        return sum(longest) + len(batches) * (case.train + case.sync)
    now = 0.0
    done: list[float] = []
    free = [[0.0] * case.slots for _ in range(case.num_engines)]
    ends: list[list[float]] = [[] for _ in range(case.num_engines)]
    for step in range(len(batches)):
        for batch in batches[len(done) : step + case.max_lag + 1]:
            loads = [sum(end > now for end in own) for own in ends]
            longest_end = now
            for seconds in batch:
                engine = int(np.argmin(loads))
                loads[engine] += 1
                end = max(now, free[engine][0]) + seconds
                heapq.heapreplace(free[engine], end)
                ends[engine].append(end)
                longest_end = max(longest_end, end)
            done.append(longest_end)
        now = max(now, done[step]) + case.train + case.sync
    return now


def measured_seconds(case: Case, prompts: Prompts, folder: Path) -> float:
    """Of all steps, by the log of the loop."""
    section = OnlineSection.model_validate(
        {
            "algorithm": "grpo",
            "dataset": {"path": "embedded:prompts"},
            "rewards": [{"type": "length", "max_tokens": 1}],
            "num_steps": case.num_steps,
            "prompts_per_step": case.num_groups,
            "num_generations": 2,
            "max_lag": case.max_lag,
            "kl_coef": 0.0,
            "track_kl": False,
        }
    )
    run_folder = RunFolder(folder)
    with placed(case, run_folder) as placement:
        run = StageRun(
            name="online",
            folder=run_folder,
            seed=SEED,
            checkpoints=Checkpoints(folder / "checkpoints", None, keep_last=1),
            progress=QuietProgress(),
            open_log=lambda start: MetricsLog(
                run_folder, "online", LoggingSection(), config={}, resume_step=start
            ),
            interrupt=Event(),
            timings=placement.timeline.take,
        )
        loop = OnlineLoop(
            section=section,
            sync=SyncSection(verify_first=0, verify_every=10**6),
            roles=roles_of(case, placement),
            prompts=prompts,
            held_out=prompts.select([]),
            run=run,
            starts_at_reference=False,
        )
        loop.train()
        run.close()
    rows = read_metrics(run_folder.metrics_path)
    assert (max(float(row["lag/max"]) for row in rows) > 0) == (case.max_lag > 0)
    return sum(float(row["time/step"]) for row in rows)


@contextmanager
def placed(case: Case, folder: RunFolder) -> Iterator[Placement]:
    shares = {"cpus": 0.001, "threads": 1}
    demands = [
        RoleDemand("policy", RoleSection.model_validate(shares), 0),
        RoleDemand("reward", RoleSection.model_validate(shares), 0),
        RoleDemand(
            "engine",
            RoleSection.model_validate({**shares, "count": case.num_engines}),
            0,
            is_apart=case.max_lag > 0,
        ),
    ]
    placement = Placement(demands, ClusterSection(start_timeout=int(START_TIMEOUT)), folder)
    try:
        yield placement
    finally:
        placement.release()


def roles_of(case: Case, placement: Placement) -> OnlineRoles:
    engines = placement.start("engine", AsyncHost if case.max_lag else Host)
    policy, reward = placement.start("policy"), placement.start("reward")
    experience = placement.start_helper("experience")
    engine_class = "StreamingSleepingEngine" if case.max_lag else "SleepingEngine"
    _build(engines, engine_class, slots=case.slots, sync=case.sync)
    _build(policy, "SleepingPolicy", train=case.train)
    _build(reward, "IdleScorer")
    _build(experience, "IdleExperience", max_lag=case.max_lag)
    placement.wait_until_built()
    calls = [RemoteEngineCalls(handle, "engine", 60.0) for handle in engines.handles]
    policy.call("connect", calls).result()
    generator = RemoteStreamingGenerator(engines) if case.max_lag else RemoteGenerator(engines)
    return OnlineRoles(
        generator=generator,
        scorer=RemoteScorer(reward),
        reference=None,
        policy=RemotePolicy(policy, SyncSection(), generator, Ragged.from_rows([[1, 2, 3]], np.int32)),
        critic=None,
        experience=RemoteExperience(experience),
    )


def _build(group: ActorGroup, worker: str, **arguments: object) -> None:
    group.build(f"benchmarks.sleepers:{worker}", [arguments] * len(group), START_TIMEOUT)


def measure(options: Options) -> list[Result]:
    sizes = (2,) if options.quick else (8, 64)
    cases = [Case(size, lag) for size in sizes for lag in (0, 1, 2)]
    if options.quick:
        cases = [replace(case, num_steps=4, answer=0.1, train=0.3, sync=0.02) for case in cases]
    results = []
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray_folder:
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=300 << 20,
            _temp_dir=ray_folder,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        try:
            results = [_result(case, options) for case in cases]
        finally:
            ray.shutdown()
    return results


def _result(case: Case, options: Options) -> Result:
    prompts = prompts_of(case)
    order = Cursor(len(prompts), SEED)
    batches = [seconds_of(prompts.select(order.next(case.num_groups))) for _ in range(case.num_steps)]
    predicted = predicted_seconds(case, batches)
    synchronous = predicted_seconds(replace(case, max_lag=0), batches)
    measured = []
    for repeat in range(max(1, options.pairs // 2)):
        measured.append(measured_seconds(case, prompts, options.folder / f"{case.name} {repeat}"))
        options.say(f"{case.name}: {measured[-1]:.2f} s, predicted {predicted:.2f} s")
    notes: dict[str, object] = {
        "predicted_seconds": predicted,
        "measured_seconds": measured,
        "predicted_speedup": synchronous / predicted,
    }
    figures = [predicted / seconds for seconds in measured]
    unit = "predicted / measured"
    return single("async-sim", figures, unit=unit, goal=GOAL, case=case.name, notes=notes)


def main(argv: Sequence[str] | None = None) -> int:
    return run_claim("async-sim", __doc__, measure, argv)
