"""Step times that other systems have published, and what this package says of the same work.

Rows named `FITTED` set `timing.Efficiency` and the constants beside it. Of the others those are judged whose
publication says all that a prediction depends on; the rest is shown, with the reason why it proves nothing.
What is not published stands in a field of its own with the value that was assumed for it. docs/planning.md
has the sources.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from rlhf_ray.config.schema import EngineSection, TrainingSection
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
    """A synchronous run, whose devices generate and train in turn.

    Fields:
        seconds: of a step. answer: mean tokens of an answer, 0 where it was not published.
        longest: tokens of prompt and answer. width: devices of an engine.
        generation: seconds of a step that are sampling, where published.
        reload: seconds in which the devices change from training to sampling and back, where published, else
            those of the same system's release 0.3: 5 s for 8B, 14 s for 70B.
        prompt: tokens: what the published rate of tokens leaves over the answers, or assumed.
        slots: answers that an engine makes at a time; vLLM's default on such GPUs.
    """

    system: str
    model: str
    gpu: str
    num_devices: int
    prompts: int
    group: int
    longest: int
    seconds: float
    answer: float = 0.0
    width: int = 1
    generation: float | None = None
    reload: float | None = None
    prompt: int = 150
    slots: int = 1024

    @cached_property
    def shape(self) -> ModelShape:
        return shape_of(self.model)

    @property
    def samples(self) -> int:
        return self.prompts * self.group

    @property
    def between(self) -> float:
        """Seconds of a step that are neither sampling nor training."""
        if self.reload is not None:
            return self.reload
        return 4.0 + 0.145 * self.shape.parameters / 1e9

    def clock(self, answer: float, efficiency: Efficiency) -> Clock:
        lengths = Lengths(answer, self.longest - self.prompt)
        return Clock(gpu(self.gpu), Work(self.samples, self.group, self.prompt, lengths), efficiency)

    def parts(self, answer: float, efficiency: Efficiency) -> tuple[float, float]:
        """Seconds of sampling, and of training with its log-probs."""
        clock = self.clock(answer, efficiency)
        engine = EngineSection(tensor_parallel_size=self.width)
        sampling = clock.generate(self.shape, engine, self.num_devices // self.width, self.slots)
        training = clock.train(self.shape, CHECKPOINTS, self.num_devices, 1, head=True)
        return sampling, training + PASSES * clock.forward(self.shape, self.num_devices)

    def predicted(self, efficiency: Efficiency) -> float:
        return sum(self.parts(self.answer, efficiency)) + self.between


@dataclass(frozen=True)
class Ahead:
    """The same work with sampling beside training.

    Fields:
        generating: devices of the engines; 0 where it was not published, and the best is taken.
        schedule: whose `generating` is filled in. seconds: of a step, published.
        training: seconds of training in this placement, published; None scales the synchronous run's.
        answer: as in `Row`, of this run. group, width: of this run where they differ.
        unknown: what was not published, or not alike in both runs; a row with such a thing is not judged.
    """

    sync: Row
    num_devices: int
    generating: int
    schedule: Schedule
    seconds: float
    training: float | None = None
    answer: float = 0.0
    group: int = 0
    width: int = 0
    unknown: str = ""


_LLAMA, _QWEN = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B"


def _nemo(
    version: str, model: str, device: str, devices: int, seconds: float, answer: float, width: int = 1
) -> Row:
    """NeMo RL's table: 64 prompts x 32 answers, prompt and answer of 4,096 tokens at most."""
    prompt = 130 if model == _LLAMA else 105
    system = f"NeMo RL {version}"
    return Row(system, model, device, devices, 64, 32, 4096, seconds, answer, width, prompt=prompt)


LLAMA_8B_03 = replace(_nemo("v0.3", _LLAMA, "H100", 8, 112, 795), generation=58.0, reload=5.0)
"""Training 28 s, log-probs 18 s: the only one whose stages were all published."""
LLAMA_8B = _nemo("v0.5", _LLAMA, "H100", 16, 92.8, 1019)
LLAMA_8B_04 = _nemo("v0.4", _LLAMA, "H100", 16, 97.7, 1060)
LLAMA_8B_GB = _nemo("v0.5", _LLAMA, "GB200", 8, 91.0, 1066)
QWEN_32B = _nemo("v0.5", _QWEN, "H100", 32, 376, 3251, width=4)
QWEN_32B_04 = _nemo("v0.4", _QWEN, "H100", 32, 393, 3206, width=4)
QWEN_32B_07 = _nemo("v0.7", _QWEN, "H100", 32, 323, 3256, width=4)
QWEN_32B_GB = _nemo("v0.5", _QWEN, "GB200", 16, 381, 3253)
QWEN_32B_GB_07 = _nemo("v0.7", _QWEN, "GB200", 16, 295, 3254, width=2)
LLAMA_70B = Row(
    "NeMo RL v0.4 draft", "meta-llama/Llama-3.1-70B", "H100", 32, 32, 16, 4096, 106, 675, width=8, prompt=130
)
_MATH_7B = Row("verl", "Qwen/Qwen2.5-Math-7B", "H20", 16, 512, 16, 20_480, 749)
VERL_FSDP = replace(_MATH_7B, width=4, generation=247.0, reload=74.0)
VERL_MEGATRON = replace(_MATH_7B, width=2, longest=8192, seconds=699.0, generation=162.0, reload=45.0)
_ASYNC_7B = replace(_MATH_7B, width=4, num_devices=32, longest=28_672, reload=0.0)
VERL_32 = replace(_ASYNC_7B, seconds=790.10, generation=357.41)
VERL_64 = replace(_ASYNC_7B, num_devices=64, seconds=365.28, generation=150.72)
VERL_128 = replace(_ASYNC_7B, num_devices=128, seconds=356.30, generation=177.85)
_DISTILL = "deepseek-ai/DeepSeek-R1-Distill-Qwen"
AREAL_1B = Row("AReaL", f"{_DISTILL}-1.5B", "H800", 128, 512, 16, 27_648, 41.0 * 3.6, reload=0.0)
AREAL_7B = Row("AReaL", f"{_DISTILL}-7B", "H800", 192, 512, 16, 27_648, 57.7 * 3.6, reload=0.0)

FITTED = (LLAMA_8B_03, QWEN_32B)
HELD_OUT = (LLAMA_8B, LLAMA_8B_04, QWEN_32B_04, QWEN_32B_07, LLAMA_8B_GB, QWEN_32B_GB, LLAMA_70B)
"""Of which all that a step depends on was published, but for the prompts' lengths."""

ONE = Schedule("one step ahead", max_lag=1)
QUARTERS = Schedule("a queue, half stale", max_lag=4, stragglers="drop", updates_a_sync=4, capacity=768)
"""Prompts are begun when weights change, so many that the queue bounds their age."""
STREAM = Schedule("streamed, 4 behind", max_lag=4, stragglers="drop")
_LAID_OUT = "training time: its pipeline has other stages in one run than in the other"
_NO_LENGTHS = "lengths"
_SCRIPTS = "lengths; 16 answers to a prompt in one run's script, 12 in the other's"
AHEAD = (
    Ahead(QWEN_32B, 64, 32, ONE, 200, answer=3252),
    Ahead(LLAMA_8B_04, 16, 8, ONE, 74.6, answer=1129),
    Ahead(QWEN_32B_04, 64, 32, ONE, 215, answer=3207),
    Ahead(QWEN_32B_07, 64, 32, ONE, 161, answer=3258),
    Ahead(LLAMA_8B_GB, 8, 4, ONE, 71.1, answer=1107),
    Ahead(QWEN_32B_GB, 32, 16, ONE, 210, answer=3258),
    Ahead(LLAMA_8B, 16, 8, ONE, 64.8, answer=1123, unknown=_LAID_OUT),
    Ahead(QWEN_32B_GB_07, 32, 16, ONE, 140, answer=3255, width=1, unknown=_LAID_OUT),
    Ahead(VERL_FSDP, 16, 4, ONE, 520, group=12, width=2, unknown=_SCRIPTS),
    Ahead(VERL_MEGATRON, 16, 4, ONE, 566, group=12, unknown=_SCRIPTS),
    Ahead(VERL_32, 32, 16, QUARTERS, 294.77, training=269.80, unknown=_NO_LENGTHS),
    Ahead(VERL_64, 64, 32, QUARTERS, 189.26, training=156.98, unknown=_NO_LENGTHS),
    Ahead(VERL_128, 128, 64, QUARTERS, 150.63, training=113.16, unknown=_NO_LENGTHS),
    Ahead(AREAL_1B, 128, 0, STREAM, 14.8 * 3.6, unknown="lengths, split of the devices"),
    Ahead(AREAL_7B, 192, 0, STREAM, 25.4 * 3.6, unknown="lengths, split of the devices"),
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

    @property
    def use(self) -> str:
        """What the row is good for."""
        if self.row in FITTED_AHEAD:
            return "fitted"
        return f"not judged, unknown: {self.row.unknown}" if self.row.unknown else "held out"


def fitted_answer(row: Row, efficiency: Efficiency) -> float:
    """Mean tokens with which the sampling, or else the step, takes as long as was published."""
    low, high = 50.0, row.longest - row.prompt - 1.0
    for _ in range(18):
        answer = (low + high) / 2
        sampling, rest = row.parts(answer, efficiency)
        found, wanted = (sampling, row.generation) if row.generation else (sampling + rest, row.seconds)
        low, high = (low, answer) if found > wanted else (answer, high)
    return (low + high) / 2


def compare_ahead(ahead: Ahead, efficiency: Efficiency, steps: int = 4) -> Compared:
    """Of the synchronous run, what is neither predicted sampling nor changing over is training, whose time is
    scaled to the other run's devices and tokens. Where lengths are not known, they are first fitted to the
    synchronous run. The other run is then predicted, and was not looked at.
    """
    row = ahead.sync
    answer = row.answer or fitted_answer(row, efficiency)
    sampling = row.generation or row.parts(answer, efficiency)[0]
    training = max(0.0, row.seconds - sampling - row.between)
    own = replace(row, group=ahead.group or row.group, width=ahead.width or row.width)
    clock = own.clock(ahead.answer or answer, efficiency)
    more = clock.work.tokens / row.clock(answer, efficiency).work.tokens
    updates = ahead.schedule.updates_a_sync

    def train(devices: int) -> float:
        return (ahead.training or training * more * row.num_devices / devices) / updates

    fleet = Fleet(
        ahead.num_devices,
        own.width,
        own.slots,
        clock.speed(own.shape, EngineSection(tensor_parallel_size=own.width)),
        train,
        sync=1.0,
        prompts=own.prompts // updates,
        group=own.group,
        lengths=clock.work.lengths,
    )
    splits = [ahead.generating] if ahead.generating else [ahead.num_devices * n // 8 for n in (4, 6)]
    outcomes = [
        simulate(fleet, replace(ahead.schedule, generating=split), steps * updates) for split in splits
    ]
    best = min(outcomes, key=lambda outcome: outcome.step)
    return Compared(ahead, best.step * updates, best)


WITHIN = 0.15


@dataclass(frozen=True)
class Verdict:
    """Of the simulation against rows that set none of its constants.

    Fields: errors: relative, by system. unjudged: rows that do not say what they depend on.
    """

    errors: tuple[tuple[str, float], ...]
    unjudged: int = 0

    @property
    def reproduced(self) -> int:
        return sum(abs(error) <= WITHIN for _, error in self.errors)

    @property
    def is_valid(self) -> bool:
        return self.reproduced == len(self.errors)

    def __str__(self) -> str:
        most = max(abs(error) for _, error in self.errors)
        counts = f"{self.reproduced} of {len(self.errors)} published step times within {WITHIN:.0%}"
        scope = f"{self.unjudged} more rows do not say what they depend on, all that stream among them"
        if self.is_valid:
            return (
                f"one step ahead, the simulation reproduces {counts}; streaming is NOT VALIDATED: {scope} "
                "(docs/planning.md)"
            )
        return (
            f"NOT VALIDATED: the simulation reproduces {counts}, and is off by up to {most:.0%}; {scope} "
            "(docs/planning.md): take its figures for a comparison of schedules, not for a promise"
        )


def verdict(efficiency: Efficiency | None = None) -> Verdict:
    judged = [ahead for ahead in AHEAD if ahead not in FITTED_AHEAD and not ahead.unknown]
    found = [compare_ahead(ahead, efficiency or Efficiency()) for ahead in judged]
    unjudged = sum(bool(ahead.unknown) for ahead in AHEAD)
    return Verdict(tuple((each.row.sync.system, each.error) for each in found), unjudged)


def validation() -> str:
    """What may be said of a simulated figure. Takes seconds: the rows are simulated anew."""
    return str(verdict())
