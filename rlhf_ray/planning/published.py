"""Step times that other systems have published, and what this package says of the same work.

The rows named `FITTED` set `timing.Efficiency`; all others are held out. What is not published stands in a
field of its own with the value that was assumed for it. docs/planning.md has the sources.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from rlhf_ray.config.schema import EngineSection, TrainingSection
from rlhf_ray.planning.decoding import Speed
from rlhf_ray.planning.hardware import gpu
from rlhf_ray.planning.lengths import Lengths
from rlhf_ray.planning.shapes import ModelShape, shape_of
from rlhf_ray.planning.simulation import Fleet, Outcome, Schedule, simulate
from rlhf_ray.planning.timing import Clock, Efficiency, Work

CHECKPOINTS = TrainingSection(gradient_checkpointing=True)
PASSES = 2
"""Without gradient: log-probs of the policy and of the reference, as GRPO recipes have it."""


@dataclass(frozen=True)
class Row:
    """A synchronous run.

    Fields:
        seconds: of a step. total: mean tokens of prompt and answer, 0 where it was not published.
        generation: seconds of a step that are sampling, where published. prompt: tokens, assumed.
        slots: answers that an engine makes at a time; the default of the system's engine.
    """

    system: str
    model: str
    gpu: str
    num_devices: int
    prompts: int
    group: int
    longest: int
    seconds: float
    total: float = 0.0
    width: int = 1
    generation: float | None = None
    prompt: int = 150
    slots: int = 256

    @cached_property
    def shape(self) -> ModelShape:
        return shape_of(self.model)

    def clock(self, total: float, efficiency: Efficiency) -> Clock:
        lengths = Lengths(total - self.prompt, self.longest - self.prompt)
        work = Work(self.prompts * self.group, self.group, self.prompt, lengths)
        return Clock(gpu(self.gpu), work, efficiency)

    def parts(self, total: float, efficiency: Efficiency) -> tuple[float, float]:
        """Seconds of sampling, and of everything else."""
        clock = self.clock(total, efficiency)
        engine = EngineSection(tensor_parallel_size=self.width)
        sampling = clock.generate(self.shape, engine, self.num_devices // self.width, self.slots)
        training = clock.train(self.shape, CHECKPOINTS, self.num_devices, 1, head=True)
        return sampling, training + PASSES * clock.forward(self.shape, self.num_devices)

    def predicted(self, efficiency: Efficiency) -> float:
        return sum(self.parts(self.total, efficiency))


@dataclass(frozen=True)
class Ahead:
    """The same work with sampling beside training.

    Fields:
        generating: devices of the engines; 0 where it was not published, and the best is taken.
        schedule: whose `generating` is filled in. seconds: of a step, published.
        training: seconds of training in this placement, published; None scales the synchronous run's.
        total: as in `Row`, of this run.
    """

    sync: Row
    num_devices: int
    generating: int
    schedule: Schedule
    seconds: float
    training: float | None = None
    total: float = 0.0


NEMO = "NeMo RL"
LLAMA_8B = Row(f"{NEMO} v0.5", "meta-llama/Llama-3.1-8B", "H100", 16, 64, 32, 4096, 92.8, 1019)
LLAMA_8B_04 = Row(f"{NEMO} v0.4", "meta-llama/Llama-3.1-8B", "H100", 16, 64, 32, 4096, 97.7, 1060)
QWEN_32B = Row(f"{NEMO} v0.5", "Qwen/Qwen3-32B", "H100", 32, 64, 32, 4096, 376, 3251, width=4)
QWEN_32B_04 = Row(f"{NEMO} v0.4", "Qwen/Qwen3-32B", "H100", 32, 64, 32, 4096, 393, 3206, width=4)
LLAMA_70B = Row(f"{NEMO} v0.4 draft", "meta-llama/Llama-3.1-70B", "H100", 32, 32, 16, 4096, 106, 675, width=8)
_MATH_7B = Row("verl", "Qwen/Qwen2.5-Math-7B", "H20", 16, 512, 16, 20_480, 749, generation=321, slots=1024)
VERL_FSDP = _MATH_7B
VERL_MEGATRON = replace(_MATH_7B, longest=8192, seconds=699, generation=207)
VERL_32 = replace(_MATH_7B, num_devices=32, longest=28_672, seconds=790.10, generation=357.41)
VERL_64 = replace(VERL_32, num_devices=64, seconds=365.28, generation=150.72)
VERL_128 = replace(VERL_32, num_devices=128, seconds=356.30, generation=177.85)
_DISTILL = "deepseek-ai/DeepSeek-R1-Distill-Qwen"
AREAL_1B = Row("AReaL", f"{_DISTILL}-1.5B", "H800", 128, 512, 16, 27_648, 41.0 * 3.6)
AREAL_7B = Row("AReaL", f"{_DISTILL}-7B", "H800", 192, 512, 16, 27_648, 57.7 * 3.6)

FITTED = (LLAMA_8B, QWEN_32B)
HELD_OUT = (LLAMA_8B_04, QWEN_32B_04, LLAMA_70B)
"""Of which all that a step depends on was published, but for the prompts' lengths."""

ONE = Schedule("one step ahead", max_lag=1)
QUARTERS = Schedule("a queue, half stale", max_lag=1, stragglers="drop", updates_a_sync=4, capacity=768)
STREAM = Schedule("streamed, 4 behind", max_lag=4, stragglers="drop")
AHEAD = (
    Ahead(LLAMA_8B, 16, 8, ONE, 64.8, total=1123),
    Ahead(LLAMA_8B_04, 16, 8, ONE, 74.6, total=1129),
    Ahead(QWEN_32B, 64, 32, ONE, 200, total=3252),
    Ahead(QWEN_32B_04, 64, 32, ONE, 215, total=3207),
    Ahead(VERL_FSDP, 16, 4, ONE, 520),
    Ahead(VERL_MEGATRON, 16, 4, ONE, 566),
    Ahead(VERL_32, 32, 16, QUARTERS, 294.77, training=269.80),
    Ahead(VERL_64, 64, 32, QUARTERS, 189.26, training=156.98),
    Ahead(VERL_128, 128, 64, QUARTERS, 150.63, training=113.16),
    Ahead(AREAL_1B, 128, 0, STREAM, 14.8 * 3.6),
    Ahead(AREAL_7B, 192, 0, STREAM, 25.4 * 3.6),
)
FITTED_AHEAD = AHEAD[:1]


@dataclass(frozen=True)
class Compared:
    """Fields: predicted, published: seconds of a step. outcome: of the simulation."""

    row: Ahead
    predicted: float
    outcome: Outcome

    @property
    def published(self) -> float:
        return self.row.seconds

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def fitted_total(row: Row, efficiency: Efficiency) -> float:
    """Mean tokens with which the sampling, or else the step, takes as long as was published."""
    low, high = row.prompt + 50.0, row.longest - 1.0
    for _ in range(18):
        total = (low + high) / 2
        sampling, rest = row.parts(total, efficiency)
        found, wanted = (sampling, row.generation) if row.generation else (sampling + rest, row.seconds)
        low, high = (low, total) if found > wanted else (total, high)
    return (low + high) / 2


def compare_ahead(ahead: Ahead, efficiency: Efficiency, steps: int = 4) -> Compared:
    """The synchronous run sets what is not published: the answers' length where it is not known, else how
    much slower or faster than planned everything is. The other run is then predicted, and was not looked at.
    """
    row, factor = ahead.sync, 1.0
    total = row.total or fitted_total(row, efficiency)
    sampling, rest = row.parts(total, efficiency)
    if row.generation is not None:
        factor, rest = row.generation / sampling, row.seconds - row.generation
    else:
        factor = row.seconds / (sampling + rest)
        rest *= factor
    clock = row.clock(ahead.total or total, efficiency)
    speed = slower(clock.speed(row.shape, EngineSection(tensor_parallel_size=row.width)), factor)
    longer = (ahead.total or total) / total

    def train(devices: int) -> float:
        if ahead.training is not None:
            return ahead.training / ahead.schedule.updates_a_sync
        return rest * longer * row.num_devices / devices / ahead.schedule.updates_a_sync

    fleet = Fleet(
        ahead.num_devices,
        row.width,
        row.slots,
        speed,
        train,
        sync=1.0,
        prompts=row.prompts // ahead.schedule.updates_a_sync,
        group=row.group,
        lengths=clock.work.lengths,
    )
    splits = [ahead.generating] if ahead.generating else [ahead.num_devices * n // 8 for n in (4, 6)]
    outcomes = [
        simulate(fleet, replace(ahead.schedule, generating=split), steps * ahead.schedule.updates_a_sync)
        for split in splits
    ]
    best = min(outcomes, key=lambda outcome: outcome.step)
    return Compared(ahead, best.step * ahead.schedule.updates_a_sync, best)


def slower(speed: Speed, factor: float) -> Speed:
    return Speed(
        speed.fixed * factor,
        speed.weights * factor,
        speed.read * factor,
        speed.compute * factor,
        speed.prefill * factor,
    )


WITHIN = 0.15


@dataclass(frozen=True)
class Verdict:
    """Of the simulation against rows that set none of its constants. Fields: errors: relative, by system."""

    errors: tuple[tuple[str, float], ...]

    @property
    def reproduced(self) -> int:
        return sum(abs(error) <= WITHIN for _, error in self.errors)

    @property
    def is_valid(self) -> bool:
        return self.reproduced == len(self.errors)

    def __str__(self) -> str:
        most = max(abs(error) for _, error in self.errors)
        counts = f"{self.reproduced} of {len(self.errors)} published step times within {WITHIN:.0%}"
        if self.is_valid:
            return f"the simulation reproduces {counts} (docs/planning.md)"
        return (
            f"NOT VALIDATED: the simulation reproduces {counts}, and is off by up to {most:.0%} "
            "(docs/planning.md): take its figures for a comparison of schedules, not for a promise"
        )


def verdict(efficiency: Efficiency | None = None) -> Verdict:
    found = (compare_ahead(ahead, efficiency or Efficiency()) for ahead in AHEAD if ahead not in FITTED_AHEAD)
    return Verdict(tuple((each.row.sync.system, each.error) for each in found))


def validation() -> str:
    """What may be said of a simulated figure. Takes seconds: the rows are simulated anew."""
    return str(verdict())
