"""The plan of a stage on given devices: memory, times, what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from rlhf_ray.config.schema import OnlineSection, RunConfig, StageName
from rlhf_ray.planning import memory as mem
from rlhf_ray.planning.hardware import GIB, Device
from rlhf_ray.planning.layout import Layout, lay_out
from rlhf_ray.planning.lengths import Lengths
from rlhf_ray.planning.memory import PHASES, Phase, RoleMemory
from rlhf_ray.planning.roles import Cast, cast_of, main_stage
from rlhf_ray.planning.stages import StageTime, step_seconds, time_stages
from rlhf_ray.planning.timing import Clock, Efficiency, Work

SPARE = 0.95
"""Of a device, what may be planned to be full: allocators leave gaps."""

SURROUNDINGS = 0.8 * GIB
"""Main memory of Ray's own processes and of the driver, where there is nothing but that."""


@dataclass(frozen=True)
class Machine:
    """Fields: num_devices: GPUs, or 1 for a machine without. per_node: of them. host: its main memory, bytes,
    where it is known."""

    device: Device
    num_devices: int
    per_node: int = 8
    host: float | None = None


@dataclass(frozen=True)
class Assumed:
    """What no configuration says. answer, prompt: mean tokens; None takes a third of max_completion_length
    and half of max_prompt_length."""

    answer: float | None = None
    prompt: float | None = None
    efficiency: Efficiency = field(default_factory=Efficiency)

    def work(self, online: OnlineSection) -> Work:
        longest = online.max_response_length
        mean = longest / 3 if self.answer is None else min(self.answer, longest)
        prompt = online.max_prompt_length / 2 if self.prompt is None else self.prompt
        return Work(online.samples_per_step, online.num_generations, prompt, Lengths(mean, longest))


@dataclass(frozen=True)
class DevicePlan:
    """Devices that hold the same. Fields: peaks: bytes in each phase."""

    devices: tuple[int, ...]
    roles: tuple[str, ...]
    peaks: Mapping[Phase, float]
    capacity: float

    @property
    def peak(self) -> float:
        return max(self.peaks.values())

    @property
    def worst(self) -> Phase:
        return max(PHASES, key=lambda phase: self.peaks[phase])

    @property
    def excess(self) -> float:
        return max(0.0, self.peak - SPARE * self.capacity)


@dataclass(frozen=True)
class Plan:
    """
    Fields:
        slots: sequences that an engine runs at a time.
    """

    config: RunConfig
    cast: Cast
    machine: Machine
    assumed: Assumed
    layout: Layout
    memories: tuple[RoleMemory, ...]

    @property
    def stage(self) -> StageName:
        return self.cast.stage

    @cached_property
    def devices(self) -> tuple[DevicePlan, ...]:
        by_role = {memory.role: memory for memory in self.memories}
        if not self.machine.device.is_gpu:
            return (self._whole_machine(by_role),)
        return tuple(
            DevicePlan(
                devices,
                roles,
                mem.total_by_phase([by_role[role] for role in roles]),
                self.machine.device.memory,
            )
            for devices, roles in self.layout.alike()
            if roles
        )

    def _whole_machine(self, by_role: Mapping[str, RoleMemory]) -> DevicePlan:
        """Main memory is not given back between phases: allocators keep what they had."""
        roles = self.layout.on(0)
        total = SURROUNDINGS + sum(by_role[role].peak for role in roles)
        return DevicePlan((0,), roles, dict.fromkeys(PHASES, total), self.machine.device.memory)

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """Why it does not fit; empty where it does."""
        found = []
        layout, machine = self.layout, self.machine
        if layout.missing:
            asked = layout.num_devices
            found.append(f"placement asks for {asked} devices, and there are {machine.num_devices}")
        for memory in self.memories:
            if memory.shortfall:
                found.append(
                    f"{memory.role}: its KV cache lacks {memory.shortfall / GIB:.1f} GiB for one prompt and "
                    "answer of the longest kind"
                )
        for device in self.devices:
            if device.excess:
                when = f" in the phase {device.worst}" if machine.device.is_gpu else ""
                found.append(
                    f"{named(device.devices, machine)}: {device.peak / GIB:.1f} GiB{when}, "
                    f"of {SPARE:.0%} of {device.capacity / GIB:.1f} GiB that may be used"
                )
        if machine.host is not None and self.host > SPARE * machine.host:
            found.append(f"main memory of a node: {self.host / GIB:.0f} GiB, of {machine.host / GIB:.0f} GiB")
        return tuple(found)

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def excess(self) -> float:
        """By how much it does not fit, to compare plans: bytes over all devices, and whole devices."""
        over = sum(len(device.devices) * device.excess for device in self.devices)
        return (
            over
            + sum(memory.shortfall for memory in self.memories)
            + self.layout.missing * self.machine.device.memory
        )

    @cached_property
    def host(self) -> float:
        """Main memory of the fullest node, bytes; without GPUs, it is the device."""
        if not self.machine.device.is_gpu:
            return 0.0
        by_role = {memory.role: memory for memory in self.memories}
        nodes: dict[int, float] = {}
        for device in range(self.layout.num_devices):
            node = device // self.layout.per_node
            nodes[node] = nodes.get(node, 0.0) + sum(by_role[role].host for role in self.layout.on(device))
        return max(nodes.values(), default=0.0)

    @property
    def online(self) -> OnlineSection | None:
        return self.config.online if self.stage == "online" else None

    @cached_property
    def clock(self) -> Clock | None:
        online = self.online
        if online is None:
            return None
        return Clock(self.machine.device, self.assumed.work(online), self.assumed.efficiency)

    @cached_property
    def slots(self) -> int:
        """Sequences that an engine runs at a time."""
        engine = self.config.engine
        found = next((memory for memory in self.memories if memory.role == "engine"), None)
        if found is None or self.clock is None:
            return engine.max_num_seqs
        work = self.clock.work
        each = mem.kv_bytes(self.cast.policy, engine) * (work.prompt + work.lengths.mean / 2)
        room = mem.cache_bytes(found) * (engine.tensor_parallel_size if self.machine.device.is_gpu else 1)
        return max(1, min(engine.max_num_seqs, int(room / each)))

    @cached_property
    def times(self) -> tuple[StageTime, ...]:
        """Of the stages of a step; empty where the stage is not predicted."""
        if self.clock is None or self.online is None or any(memory.shortfall for memory in self.memories):
            return ()
        return time_stages(self.config, self.online, self.cast, self.layout, self.clock, self.slots)

    @cached_property
    def step(self) -> float:
        """Seconds of a step."""
        if self.online is None:
            return 0.0
        return step_seconds(self.times, self.layout, self.online.max_lag)

    @property
    def bottleneck(self) -> StageTime | None:
        return max(self.times, key=lambda time: time.seconds, default=None)


def named(devices: tuple[int, ...], machine: Machine) -> str:
    """Such as `GPU 0-7, 16`."""
    if not machine.device.is_gpu:
        return "this machine"
    return f"GPU {runs(devices)}"


def runs(numbers: Iterable[int]) -> str:
    """Of rising numbers, such as `0-7, 16`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in found)


def make_plan(
    config: RunConfig, machine: Machine, assumed: Assumed | None = None, stage: StageName | None = None
) -> Plan:
    """
    Args:
        stage: of the configuration; None is reinforcement learning, or the last.

    Raises:
        ConfigError: there is no such stage. ModelError: the shape of a model cannot be told.
    """
    cast = cast_of(config, stage or main_stage(config))
    layout = lay_out(cast.wanted(config), config.placement, machine.num_devices, machine.per_node)
    if not machine.device.is_gpu:
        layout = _on_one_machine(layout)
    memories = []
    for placed in layout.placed:
        found = _memory(placed.role, config, cast, machine.device)
        memories.append(found.taking_turns() if layout.moves_out and machine.device.is_gpu else found)
    return Plan(config, cast, machine, assumed or Assumed(), layout, tuple(memories))


def _on_one_machine(layout: Layout) -> Layout:
    """Every actor in the same memory, where there are no GPUs."""
    placed = tuple(type(each)(each.role, tuple((0,) for _ in each.devices)) for each in layout.placed)
    return Layout(placed, 1, 1, moves_out=False)


def _memory(role: str, config: RunConfig, cast: Cast, device: Device) -> RoleMemory:
    training, placement, longest = config.training, config.placement, cast.longest
    if role == "policy":
        return mem.trained(
            "policy", cast.policy, training, ranks=placement.policy.count, longest=longest, device=device
        )
    if role == "critic":
        assert cast.critic is not None
        return mem.trained(
            "critic", cast.critic, training, ranks=placement.critic.count, longest=longest, device=device
        )
    if role == "reference":
        assert cast.reference is not None
        if placement.reference.backend == "vllm":
            return mem.engine(role, cast.reference, config.engine, longest=longest, device=device)
        ranks = placement.reference.count
        return mem.frozen(
            "reference", [cast.reference], training, ranks=ranks, longest=longest, device=device
        )
    if role == "reward":
        if placement.reward.backend == "vllm":
            return mem.engine(role, cast.rewards[0], config.engine, longest=longest, device=device)
        ranks = placement.reward.count
        return mem.frozen("reward", cast.rewards, training, ranks=ranks, longest=longest, device=device)
    shape = cast.judge if role == "judge" else cast.policy
    assert shape is not None
    return mem.engine(role, shape, config.engine, longest=longest, device=device)
