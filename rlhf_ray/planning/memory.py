"""What each role keeps in the memory of a device, and in which phases of a step.

The formulas follow the code that they describe: the trainer holds float32 weights and computes in bfloat16
under autocast (`engines/deepspeed_engine.py`), the head is applied in chunks (`models/heads.py`), frozen
models are float32, and vLLM takes its share of a GPU and fills what is left of it with the KV cache. Their
constants were set by what processes were seen to take (`rlhf-ray bench plan-memory`; docs/planning.md has the
figures).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from rlhf_ray.config.schema import EngineSection, TrainingSection
from rlhf_ray.models.sizes import CHUNK_TOKENS
from rlhf_ray.planning.hardware import GIB, Device
from rlhf_ray.planning.shapes import ModelShape

Phase = Literal["generate", "reward", "reference", "log-probs", "values", "critic", "policy", "sync"]
"""Of a step: sampling; the frozen models; the first look of the policy and of the critic; an update of the
critic, of the policy; publishing."""
PHASES: tuple[Phase, ...] = get_args(Phase)
Kind = Literal["weights", "gradients", "optimizer", "activations", "KV cache", "buffers", "process"]
Trained = Literal["policy", "critic"]
Frozen = Literal["reference", "reward"]
KINDS: tuple[Kind, ...] = get_args(Kind)

BUCKET_ELEMENTS = 500_000_000
"""Gradients that DeepSpeed reduces at a time at stages 1 and 2 (`reduce_bucket_size`), from a buffer of so
many."""
LIVE_PARAMETERS = 1_000_000_000
"""That stage 3 leaves gathered (`stage3_max_live_parameters`)."""
PREFETCH = 50_000_000
DIFFERENTIATED = 4
"""Times what a layer keeps for the backward pass, that differentiating it takes beside it."""
KERNELS = 4
"""Bytes a parameter that the CPU's kernels and the allocator were seen to keep in training."""
WIRE_MESSAGES = 3
"""Groups of tensors that exist at a time while weights are sent: one is made, two are under way."""
PACKED_BUFFER = GIB
"""vLLM's staging buffer for weights on the same GPU."""
BATCHED_TOKENS = 8192
"""Of a forward pass of the engine while it reads prompts."""


@dataclass(frozen=True)
class Processes:
    """Bytes that a process takes before it holds anything of a model."""

    trainer: float
    frozen: float
    engine: float


ON_CPU = Processes(trainer=0.42 * GIB, frozen=0.40 * GIB, engine=0.90 * GIB)
ON_GPU = Processes(trainer=1.2 * GIB, frozen=0.6 * GIB, engine=1.5 * GIB)
"""CUDA's context, the kernels' workspaces, NCCL's buffers and what the allocator cannot use. Taken from what
others report; not measured by this project."""


WORKS: Mapping[str, frozenset[Phase]] = {
    "policy": frozenset(("log-probs", "policy", "sync")),
    "critic": frozenset(("values", "critic")),
    "reference": frozenset(("reference",)),
    "reward": frozenset(("reward",)),
    "judge": frozenset(("reward",)),
    "engine": frozenset(("generate", "sync")),
}
"""Role -> when it does something."""


@dataclass(frozen=True)
class Term:
    """Bytes of one kind on one device. phases: in which they are there; None is always."""

    kind: Kind
    num_bytes: float
    phases: frozenset[Phase] | None = None

    def during(self, phase: Phase) -> float:
        return self.num_bytes if self.phases is None or phase in self.phases else 0.0


@dataclass(frozen=True)
class RoleMemory:
    """Of one actor of a role on one of its devices.

    Fields:
        shortfall: bytes by which what the role was given is too little for it to start at all.
        host: bytes of main memory that it takes.
    """

    role: str
    terms: tuple[Term, ...]
    shortfall: float = 0.0
    host: float = 0.0

    def during(self, phase: Phase) -> float:
        return sum(term.during(phase) for term in self.terms)

    @property
    def peak(self) -> float:
        return max(self.during(phase) for phase in PHASES)

    def of_kind(self, kind: Kind) -> float:
        """At its largest."""
        return max(sum(term.during(phase) for term in self.terms if term.kind == kind) for phase in PHASES)

    def taking_turns(self) -> RoleMemory:
        """Where who waits moves its memory to the CPU's: on the device it is while its role works."""
        works = WORKS[self.role]

        def phases_of(term: Term) -> frozenset[Phase] | None:
            if term.kind == "process":
                return None
            # Engines wake up for new weights before they make room for the KV cache.
            own = works - {"sync"} if self.role == "engine" and term.kind != "weights" else works
            return own if term.phases is None else term.phases & own

        terms = tuple(Term(term.kind, term.num_bytes, phases_of(term)) for term in self.terms)
        # An engine at sleep level 1 keeps its weights; the KV cache is dropped.
        kept = sum(t.num_bytes for t in self.terms if t.phases is None and t.kind in ("weights", "optimizer"))
        return RoleMemory(self.role, terms, self.shortfall, self.host + kept)


def _in(*phases: Phase) -> frozenset[Phase]:
    return frozenset(phases)


@dataclass(frozen=True)
class StateBytes:
    """Bytes a parameter of what training keeps of it. moments: both of Adam's."""

    weights: float
    gradients: float
    master: float
    moments: float

    def per_rank(self, parameters: float, trained: float, ranks: int, zero_stage: int) -> dict[Kind, float]:
        """ZeRO divides over ranks: from stage 1 the optimizer's states, from stage 2 the gradients, at stage
        3 the weights (Rajbhandari et al. 2020, section 5)."""
        optimizer = self.moments if zero_stage == 0 else self.moments + self.master
        return {
            "weights": self.weights * parameters / (ranks if zero_stage == 3 else 1),
            "gradients": self.gradients * trained / (ranks if zero_stage >= 2 else 1),
            "optimizer": optimizer * trained / (ranks if zero_stage >= 1 else 1),
        }


FLOAT32 = StateBytes(weights=4, gradients=4, master=4, moments=8)
"""As the trainer has it; the flat float32 copy that DeepSpeed steps on is the master."""
BFLOAT16 = StateBytes(weights=2, gradients=6, master=4, moments=8)
"""As DeepSpeed's own estimators have it: gradients in bfloat16 and, for the step, in float32."""


def trained(
    role: Trained,
    shape: ModelShape,
    training: TrainingSection,
    *,
    ranks: int,
    longest: int,
    device: Device,
) -> RoleMemory:
    """One rank of a model in training.

    Args:
        longest: tokens of the longest row, which is a micro-batch even if it exceeds the budget.
    """
    is_scalar = role == "critic"
    parameters = shape.scalar_parameters if is_scalar else shape.parameters
    trains = parameters if training.lora is None else shape.trained(training.lora)
    states = FLOAT32.per_rank(parameters, trains, ranks, training.zero_stage)
    host = 0.0
    if training.offload_optimizer != "none":
        # The step is made on the CPU, which has the gradients for it.
        host += (states["optimizer"] + states["gradients"]) if training.offload_optimizer == "cpu" else 0.0
        states["optimizer"] = 0.0
        states["gradients"] /= ranks if training.zero_stage == 1 else 1
    if training.offload_parameters != "none":
        host += states["weights"] if training.offload_parameters == "cpu" else 0.0
        states["weights"] = 0.0
    tokens = max(training.tokens_per_micro_batch, longest) // training.sequence_parallel_size
    look: Phase = "values" if is_scalar else "log-probs"
    own, looks = _in(role), _in(look, role)
    terms = [
        Term("weights", states["weights"]),
        Term("weights", _casts(shape, training, is_scalar), own),
        Term("gradients", states["gradients"], own),
        Term("optimizer", states["optimizer"]),
        Term("activations", activations(shape, training, tokens), own),
        Term("activations", _moving(shape, training, tokens, is_scalar), own),
        Term("activations", passing(shape, training, tokens), _in(look)),
        Term("buffers", _bucket(trains, training, device), own),
        Term("buffers", 0.0 if device.is_gpu else KERNELS * parameters, own),
        Term("buffers", _gathered(shape, training.zero_stage == 3, ranks), looks),
        Term("process", (ON_GPU if device.is_gpu else ON_CPU).trainer),
    ]
    if not is_scalar:
        terms.append(Term("activations", logits(shape, tokens, trains=False), _in(look)))
        terms.append(Term("buffers", _wire(shape, training, device), _in("sync")))
    return RoleMemory(role, tuple(terms), host=host)


def frozen(
    role: Frozen,
    shapes: Iterable[ModelShape],
    training: TrainingSection,
    *,
    ranks: int = 1,
    longest: int,
    device: Device,
) -> RoleMemory:
    """One actor of the reference, or of reward models, which are all on one device. ranks: that hold a part
    of the weights each."""
    shapes = list(shapes)
    tokens = max(training.tokens_per_micro_batch, longest)
    passes = [passing(shape, training, tokens) for shape in shapes]
    heads = [logits(shape, tokens, trains=False) if role == "reference" else 0.0 for shape in shapes]
    casts = [2.0 * shape.largest_piece if training.uses_bfloat16 else 0.0 for shape in shapes]
    sizes = [shape.parameters if role == "reference" else shape.scalar_parameters for shape in shapes]
    gathered = [_gathered(shape, ranks > 1, ranks) for shape in shapes]
    scoring = _in(role)
    terms = (
        Term("weights", 4.0 * sum(sizes) / ranks),
        Term("weights", max(casts, default=0.0), scoring),
        Term("activations", max((a + b for a, b in zip(passes, heads, strict=True)), default=0.0), scoring),
        Term("buffers", max(gathered, default=0.0), scoring),
        Term("process", (ON_GPU if device.is_gpu else ON_CPU).frozen),
    )
    return RoleMemory(role, terms)


def engine(
    role: str, shape: ModelShape, section: EngineSection, *, longest: int, device: Device
) -> RoleMemory:
    """One of an engine's tensor-parallel workers. longest: tokens of a prompt and its answer."""
    itemsize = 2 if section.number_format == "bfloat16" else 4
    parts = section.tensor_parallel_size
    weights = itemsize * shape.parameters / parts
    if not device.is_gpu:
        # The matrices are packed anew for the CPU's kernels; the weights as they were read stay as well.
        terms = (
            Term("weights", 2 * weights),
            Term("KV cache", section.cpu_kv_cache_gib * GIB),
            Term("process", ON_CPU.engine),
        )
        return RoleMemory(role, terms)
    widest = 2 * (shape.width + 2 * shape.intermediate / parts)
    workspace = BATCHED_TOKENS * itemsize * widest + 6.0 * section.max_num_seqs * shape.vocabulary
    share = section.gpu_memory_utilization * device.memory
    cache = share - weights - workspace
    needed = kv_bytes(shape, section) * longest / parts
    return RoleMemory(
        role,
        (
            Term("weights", weights),
            Term("activations", workspace),
            Term("KV cache", max(cache, 0.0)),
            Term("process", ON_GPU.engine),
        ),
        shortfall=max(0.0, needed - cache),
    )


def kv_bytes(shape: ModelShape, section: EngineSection) -> int:
    """Of one token, over all tensor-parallel workers."""
    return shape.kv_bytes(2 if section.number_format == "bfloat16" else 4)


def cache_bytes(memory: RoleMemory) -> float:
    return memory.of_kind("KV cache")


def activations(shape: ModelShape, training: TrainingSection, tokens: int) -> float:
    """Kept for the backward pass.

    A layer keeps of each token the residual stream before both norms, the normalised stream, and its copies
    that the matrices of attention (3) and MLP (2) take in; queries, keys and values (repeated for all heads)
    and what attention gives; of the MLP the gate, its activation, the other half, and their product. With
    checkpoints only the residual stream at its beginning, and everything of one layer at a time.
    """
    layer = layer_bytes(shape, training)
    if training.gradient_checkpointing:
        return float(tokens * (shape.layers * 4 * shape.width + layer))
    return float(tokens * shape.layers * layer)


def layer_bytes(shape: ModelShape, training: TrainingSection) -> int:
    """That a layer keeps of a token."""
    if training.uses_bfloat16:
        return (4 * 4 + 5 * 2) * shape.width + 4 * 2 * shape.queries + 4 * 2 * shape.intermediate
    return (4 + 2) * 4 * shape.width + 4 * 4 * shape.queries + 4 * 4 * shape.intermediate


def _moving(shape: ModelShape, training: TrainingSection, tokens: int, is_scalar: bool) -> float:
    """Of the backward pass at its two widest places, of which it is at one: the head, and a layer."""
    head = 0.0 if is_scalar else logits(shape, tokens, trains=True)
    return max(head, float(tokens * DIFFERENTIATED * layer_bytes(shape, training)))


def passing(shape: ModelShape, training: TrainingSection, tokens: int) -> float:
    """Of a forward pass without gradient: the widest layer's tensors."""
    computing = 2 if training.uses_bfloat16 else 4
    return float(tokens * (3 * 4 * shape.width + 3 * computing * shape.intermediate))


def logits(shape: ModelShape, tokens: int, *, trains: bool) -> float:
    """Of a chunk: as the head gives them, in float32, their exponentials; and their gradient."""
    return (13.0 if trains else 10.0) * min(CHUNK_TOKENS, tokens) * shape.vocabulary


def _casts(shape: ModelShape, training: TrainingSection, is_scalar: bool) -> float:
    """The bfloat16 copies of matrices that autocast makes and the backward pass needs."""
    if not training.uses_bfloat16:
        return 0.0
    if training.zero_stage == 3 and training.gradient_checkpointing:
        return 2.0 * shape.largest_piece
    return 2.0 * (shape.computed + (0 if is_scalar else shape.head))


def _bucket(trains: int, training: TrainingSection, device: Device) -> float:
    """Gradients on their way to the other ranks."""
    if training.zero_stage == 0:
        return 0.0
    # Memory of a CPU counts where it is written to; a GPU's where it is asked for.
    elements = BUCKET_ELEMENTS if device.is_gpu else min(trains, BUCKET_ELEMENTS)
    return 4.0 * elements


def _gathered(shape: ModelShape, is_partitioned: bool, ranks: int) -> float:
    """Whole weights that ZeRO-3 has at a time."""
    if not is_partitioned or ranks == 1:
        return 0.0
    return 4.0 * max(shape.largest_piece, min(shape.parameters, LIVE_PARAMETERS + PREFETCH))


def _wire(shape: ModelShape, training: TrainingSection, device: Device) -> float:
    """A layer gathered, and messages of a layer in the engine's type; or vLLM's own buffer."""
    gathered = 4.0 * shape.largest_piece if training.zero_stage == 3 else 0.0
    if device.is_gpu:
        return gathered + max(PACKED_BUFFER, 2.0 * shape.head)
    return gathered + WIRE_MESSAGES * 2.0 * shape.largest_piece


def total_by_phase(memories: Iterable[RoleMemory]) -> Mapping[Phase, float]:
    """Of actors that share a device."""
    memories = list(memories)
    return {phase: sum(memory.during(phase) for memory in memories) for phase in PHASES}
