"""Schedules of a planned run, simulated and set side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlhf_ray.errors import ConfigError
from rlhf_ray.planning.plan import Plan
from rlhf_ray.planning.simulation import Fleet, Outcome, Schedule, simulate

SYNCHRONOUS = Schedule("synchronous")
SCHEDULES = (
    SYNCHRONOUS,
    Schedule("one step ahead", max_lag=1),
    Schedule("streamed, 1 behind", max_lag=1, stragglers="drop"),
    Schedule("streamed, 2 behind", max_lag=2, stragglers="drop"),
    Schedule("streamed, 4 behind", max_lag=4, stragglers="drop"),
)
SPLITS = 8
"""Parts of the devices; of the ways to give some of them to the engines, the fastest is taken."""


@dataclass(frozen=True)
class Simulated:
    """Fields: schedule: with the devices that it gave to the engines. outcome: simulated."""

    schedule: Schedule
    outcome: Outcome

    @property
    def keys(self) -> str:
        """By which a configuration asks for it."""
        lag = f"online.max_lag={self.schedule.max_lag}"
        return lag if self.schedule.stragglers == "wait" else f"{lag} online.stragglers=drop"


def fleet_of(plan: Plan, num_devices: int | None = None) -> Fleet:
    """The devices of a plan, or more of them with the same work.

    Raises:
        ConfigError: there is nothing to simulate.
    """
    if plan.clock is None or plan.online is None or not plan.times:
        raise ConfigError(
            "--simulate: only reinforcement learning is simulated, with an engine that can start"
        )
    work, engine = plan.clock.work, plan.config.engine
    speed = plan.clock.speed(plan.cast.policy, engine)
    sync = sum(time.seconds for time in plan.times if time.phase == "sync")
    return Fleet(
        num_devices or plan.machine.num_devices,
        engine.tensor_parallel_size if plan.machine.device.is_gpu else 1,
        plan.slots,
        speed,
        lambda devices: rest_seconds(plan, devices),
        sync,
        plan.online.prompts_per_step,
        plan.online.num_generations,
        work.lengths,
    )


def rest_seconds(plan: Plan, devices: int) -> float:
    """Of all stages but sampling and publishing, in turn on so many devices: models that have ranks share the
    computing; what single actors do, and what is moved, takes as long as it does."""
    total = 0.0
    for time in plan.times:
        if time.phase in ("generate", "sync"):
            continue
        ranks = len(plan.layout[time.role].devices)
        shared = time.role in ("policy", "critic") or ranks > 1
        total += time.communication + time.computing * (ranks / devices if shared else 1.0)
    return total


def simulate_all(
    fleet: Fleet, schedules: Sequence[Schedule] = SCHEDULES, steps: int = 6, seed: int = 0
) -> list[Simulated]:
    """Each schedule with the split of the devices that makes it fastest."""
    found = []
    for schedule in schedules:
        splits = [0] if schedule is SYNCHRONOUS or schedule.max_lag == 0 else _splits(fleet)
        tried = [
            Simulated(own, simulate(fleet, own, steps, seed))
            for own in (replace(schedule, generating=split) for split in splits)
        ]
        if tried:
            found.append(min(tried, key=lambda each: each.outcome.step))
    return found


def _splits(fleet: Fleet) -> list[int]:
    parts = {fleet.num_devices * part // SPLITS // fleet.width * fleet.width for part in range(1, SPLITS)}
    return sorted(split for split in parts if 0 < split < fleet.num_devices)
