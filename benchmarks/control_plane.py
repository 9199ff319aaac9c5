"""What the machinery around the stages costs, in microseconds a sample: PPO whose stages do no work.

The loop, the actors, the roles over them, turns, timeline, deadlines, metrics log and object store are the
real ones; the workers in the actors return recorded arrays of the real types and sizes (`noop_workers`). One
answer a prompt, so that as many prompts as samples pass through the driver. Roles take turns, as where they
share cores: nothing overlaps, and every cost shows.

Counted is the wall time of a step less the time inside the workers' methods: choosing and sending prompts,
scheduling, messages, (un)pickling, copies into the object store, the waiting between one call's end and the
next one's start, and logging. Not counted is what a worker does with what it was given; of that, `prepare`
(the real advantages, metrics and the Parquet file of all samples, of shorter answers) is a row of its own.

`driver` is the part of it that is the driver process's own CPU time, Ray's threads in it included. `growth`
divides the cost of a sample in steps of 16k samples by that in steps of 4k, of answers a quarter as long, so
that the larger step has as many tokens as the main row and fits in the same memory.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import numpy as np

from actors.engine_calls import RemoteEngineCalls
from actors.group import ActorGroup
from actors.roles import (
    RemoteCritic,
    RemoteExperience,
    RemoteGenerator,
    RemotePolicy,
    RemoteReference,
    RemoteScorer,
)
from benchmarks.measure import GIB, tree_memory
from benchmarks.paired import Goal, Options, Result, compare, run_claim, single
from launch.cluster import cluster
from launch.placement import Placement, RoleDemand
from rlhf_ray.config.schema import (
    ClusterSection,
    DatasetSection,
    FunctionReward,
    LoggingSection,
    ModelSection,
    OnlineSection,
    RoleSection,
    SyncSection,
)
from rlhf_ray.loops.checkpoints import Checkpoints
from rlhf_ray.loops.online import OnlineLoop, OnlineRoles
from rlhf_ray.loops.stage_run import StageRun
from rlhf_ray.models.loading import materialise
from rlhf_ray.reporting.metrics_log import MetricsLog
from rlhf_ray.reporting.progress import QuietProgress
from rlhf_ray.reporting.run_folder import RunFolder
from rlhf_ray.types import Metrics, Prompts, Ragged

MICRO = 1e6
PROMPT_TOKENS = 64
NUM_ENGINES = 2
CALL_TIMEOUT = 300
WARM_STEPS = 3
"""Not counted: they touch the object store's memory, and the actors' views of it, for the first time."""


@dataclass(frozen=True)
class Size:
    """Of one step. tokens: of each answer."""

    samples: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.samples} x {self.tokens}"


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step. outside: workers' methods. driver: CPU. prepare: inside that method."""

    size: Size
    outside: float
    driver: float
    prepare: float

    @classmethod
    def of(cls, size: Size, logged: Metrics) -> StepCost:
        return cls(
            size,
            outside=logged["time/overhead"] * logged["time/step"],
            driver=logged["time/driver_cpu"],
            prepare=logged["time/prepare"],
        )

    def per_sample(self, seconds: float) -> float:
        """In microseconds."""
        return MICRO * seconds / self.size.samples


def recorded_prompts(count: int) -> Prompts:
    """A turn of a few hundred characters and a column each, as datasets have them."""
    text = "Please explain how this works, step by step, to somebody who has never seen it. " * 3
    tokens = np.random.default_rng(1).integers(3, 250, count * PROMPT_TOKENS, dtype=np.int32)
    return Prompts(
        ids=np.arange(count),
        messages=tuple(({"role": "user", "content": f"{text}{row}"},) for row in range(count)),
        token_ids=Ragged.from_lengths(tokens, np.full(count, PROMPT_TOKENS)),
        columns=tuple({"answer": str(row)} for row in range(count)),
    )


def section_of(size: Size, steps: int) -> OnlineSection:
    return OnlineSection(
        algorithm="ppo",
        dataset=DatasetSection(path="recorded"),
        rewards=(FunctionReward(type="function", name="constant", function="benchmarks:nothing"),),
        num_steps=steps,
        prompts_per_step=size.samples,
        max_completion_length=size.tokens,
        max_prompt_length=PROMPT_TOKENS,
        critic_init="policy",
    )


class Stage:
    """The actors of an online stage, each around a worker that does nothing."""

    def __init__(self, placement: Placement, folder: Path) -> None:
        self.placement = placement
        self.folder = folder
        self.num_runs = 0
        self.engines = self._group("engine", "RecordedEngine")
        self.policy = self._group("policy", "SilentModel")
        self.critic = self._group("critic", "SilentModel")
        self.reference = self._group("reference", "SilentModel")
        self.scorer = self._group("reward", "ConstantScorer")
        self.experience = placement.start_helper("experience")
        self._build(self.experience, f"{NOOP}:CopyingExperience")
        placement.wait_until_built()
        calls = [
            RemoteEngineCalls(handle, f"engine[{rank}]", CALL_TIMEOUT)
            for rank, handle in enumerate(self.engines.handles)
        ]
        self.policy.call("connect", calls).result()

    def _group(self, role: str, worker: str) -> ActorGroup:
        group = self.placement.start(role)
        self._build(group, f"{NOOP}:{worker}")
        return group

    @staticmethod
    def _build(group: ActorGroup, factory: str, **arguments: object) -> None:
        group.build(factory, [arguments] * len(group), CALL_TIMEOUT)

    def with_real_experience(self, section: OnlineSection, policy: ModelSection) -> ActorGroup:
        group = self.placement.start_helper("prepare")
        self._build(
            group,
            "rlhf_ray.workers.experience:ExperienceWorker",
            section=section,
            policy=policy,
            rollouts_folder=self.folder / "rollouts",
        )
        group.wait_until_built()
        return group

    def run(
        self, size: Size, steps: int, prompts: Prompts, experience: ActorGroup | None = None
    ) -> list[StepCost]:
        """Train for so many steps after those that warm up."""
        generator = RemoteGenerator(self.engines)
        probe = Ragged.from_rows([prompts.token_ids[0]], np.int32)
        roles = OnlineRoles(
            generator=generator,
            scorer=RemoteScorer(self.scorer),
            reference=RemoteReference(self.reference),
            policy=RemotePolicy(self.policy, SyncSection(), generator, probe),
            critic=RemoteCritic(self.critic),
            experience=RemoteExperience(experience or self.experience),
        )
        logged: list[Metrics] = []
        run = self._stage_run(logged)
        loop = OnlineLoop(
            section=section_of(size, steps + WARM_STEPS),
            sync=SyncSection(),
            roles=roles,
            prompts=prompts.select(np.arange(size.samples)),
            held_out=prompts.select(np.arange(NUM_ENGINES)),
            run=run,
            starts_at_reference=False,
        )
        gc.collect()
        try:
            loop.train()
        finally:
            run.close()
        return [StepCost.of(size, metrics) for metrics in logged[WARM_STEPS:]]

    def _stage_run(self, logged: list[Metrics]) -> StageRun:
        folder = RunFolder(self.folder / f"run-{self.num_runs}")
        self.num_runs += 1

        class Watching(QuietProgress):
            def step(self, step: int, metrics: Metrics) -> None:
                logged.append(metrics)

        return StageRun(
            name="online",
            folder=folder,
            seed=0,
            checkpoints=Checkpoints(folder.path / "checkpoints", every=None, keep_last=1),
            progress=Watching(),
            open_log=lambda start: MetricsLog(folder, "online", LoggingSection(), config={}),
            interrupt=Event(),
            timings=driver_timings(self.placement.timeline.take),
        )


NOOP = "benchmarks.noop_workers"


def driver_timings(take: Callable[[], Metrics]) -> Callable[[], Metrics]:
    """With the CPU seconds that this process has used since it was last asked."""
    last = time.process_time()

    def timings() -> Metrics:
        nonlocal last
        earlier, last = last, time.process_time()
        return {**take(), "time/driver_cpu": last - earlier}

    return timings


@contextmanager
def stage(folder: Path, object_store_mib: int) -> Iterator[Stage]:
    roles = {name: RoleSection(gpus=0) for name in ("policy", "critic", "reference", "reward")}
    roles["engine"] = RoleSection(gpus=0, count=NUM_ENGINES)
    section = ClusterSection(object_store_mib=object_store_mib, call_timeout=CALL_TIMEOUT)
    with cluster(section):
        demands = [RoleDemand(name, role, memory=0) for name, role in roles.items()]
        placement = Placement(demands, section, RunFolder(folder))
        try:
            yield Stage(placement, folder)
        finally:
            placement.release()


@dataclass(frozen=True)
class Plan:
    """What is measured. object_store_mib: what the largest step needs."""

    main: Size
    small: Size
    large: Size
    prepare: Size
    object_store_mib: int


FULL = Plan(Size(4096, 2048), Size(4096, 512), Size(16384, 512), Size(1024, 512), object_store_mib=1000)
QUICK = Plan(Size(256, 128), Size(256, 32), Size(1024, 32), Size(64, 32), object_store_mib=150)


def measure(options: Options) -> list[Result]:
    plan = QUICK if options.quick else FULL
    steps = 2 if options.quick else 12
    prompts = recorded_prompts(max(plan.main.samples, plan.large.samples))
    with stage(options.folder, plan.object_store_mib) as actors:
        costs = actors.run(plan.main, max(options.pairs, steps), prompts)
        for cost in costs:
            options.say(f"control-plane {plan.main}: {cost.per_sample(cost.outside):.1f} us a sample")
        notes: dict[str, object] = {"memory_gib": round(tree_memory(os.getpid()) / GIB, 2)}

        def arm(size: Size) -> float:
            found = actors.run(size, steps, prompts)
            return float(np.median([cost.per_sample(cost.outside) for cost in found]))

        growth = compare(
            "control-plane",
            lambda: arm(plan.large),
            lambda: arm(plan.small),
            unit="us a sample",
            case=f"growth {plan.small} to {plan.large.samples}",
            goal=Goal("<=", 1.2),
            pairs=options.pairs,
            warmups=1,
            say=options.say,
        )
        return [*_rows(plan.main, costs, notes), growth, _prepare(actors, plan.prepare, prompts, options)]


def _rows(size: Size, costs: Sequence[StepCost], notes: dict[str, object]) -> list[Result]:
    outside = [cost.per_sample(cost.outside) for cost in costs]
    driver = [cost.per_sample(cost.driver) for cost in costs]
    return [
        single(
            "control-plane", outside, unit="us a sample", case=str(size), goal=Goal("<=", 25.0), notes=notes
        ),
        single("control-plane", driver, unit="us a sample", case=f"{size}, driver"),
    ]


def _prepare(actors: Stage, size: Size, prompts: Prompts, options: Options) -> Result:
    policy = ModelSection(path=options.model) if options.model else ModelSection()
    policy = policy.model_copy(update={"path": str(materialise(policy))})
    steps = options.pairs
    experience = actors.with_real_experience(section_of(size, steps + WARM_STEPS), policy)
    found = [cost.per_sample(cost.prepare) for cost in actors.run(size, steps, prompts, experience)]
    return single("control-plane", found, unit="us a sample", case=f"prepare {size}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_claim("control-plane", __doc__, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
