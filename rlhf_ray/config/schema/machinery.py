"""What a run stands on, whatever it trains: training, engines, placement, logging, cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, SecretStr, model_validator

from rlhf_ray.config.schema.base import NonNegative, Positive, Section


class LoraSection(Section):
    """Low-rank adapters (LoRA; Hu et al. 2021): a frozen matrix W computes as W + alpha / rank * B A, and
    only A and B are trained; in a model that scores, its head too.

    target_modules: linear layers by name (`q_proj`), or all of them but the head.
    There is no dropout: log-probs of the same weights must be equal at every call.
    """

    rank: Positive = 16
    alpha: Positive = 32
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"


Layout = Literal["padded", "packed", "shared"]
"""How the sequences of a micro-batch stand in the rectangle that a model takes: each in a row of its own; one
behind the other in a single row; the answers to a prompt behind it in one row."""


Offload = Literal["none", "cpu", "nvme"]
Attention = Literal["auto", "sdpa", "flash_attention_2", "flash_attention_3"]


class TrainingSection(Section):
    """How every trained model (policy, critic, reward model) is trained.

    precision: `mixed` is float32 master weights with bfloat16 autocast; `float32` is exact, and slower where
    the hardware multiplies bfloat16 numbers. `auto` is mixed there, and float32 on a CPU that does not
    (without AVX-512), where mixed would take ten times as long.
    tokens_per_micro_batch: budget of padded tokens in one forward/backward; raises or lowers memory, never
    the result.
    packing: sequences of a micro-batch in one row, without padding. Each attends by itself: in one kernel
    with FlashAttention on a GPU, else one after the other, which pays on a CPU. A model with windows gets a
    mask over the whole row.
    share_prompts: in the online stage, the answers to a prompt stand behind it in one row, and it is computed
    once for all of them that a micro-batch has, with the same result. Pays where num_generations is large and
    answers are not much longer than prompts. For models whose every layer has full attention.
    lora: null trains all weights. Adapters want a learning rate about ten times that of all weights.
    offload_optimizer: keeps Adam's moments and the float32 weights that it updates in main memory, from
    ZeRO 1 on, or in files below nvme_path, at ZeRO 3. offload_parameters: at ZeRO 3, the weights too.
    sequence_parallel_size: ranks that share the tokens of every sequence (DeepSpeed Ulysses), for contexts
    whose activations are too much for one device. Divides the ranks of every trained model, and the heads of
    its attention.
    attention: `auto` is the library's choice, sdpa mostly. FlashAttention is for GPUs, and computes packed
    rows without a mask.
    """

    precision: Literal["auto", "mixed", "float32"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 1
    tokens_per_micro_batch: Positive = 4096
    packing: bool = False
    share_prompts: bool = False
    gradient_checkpointing: bool = False
    lora: LoraSection | None = None
    offload_optimizer: Offload = "none"
    offload_parameters: Offload = "none"
    nvme_path: str | None = Field(None, description="an existing folder on a fast disk of every node")
    sequence_parallel_size: Positive = 1
    attention: Attention = "auto"

    @property
    def lockstep_tokens(self) -> int | None:
        """The most tokens of a forward, where all ranks must take equally many steps through each of them."""
        return self.tokens_per_micro_batch if self.zero_stage == 3 else None

    @property
    def uses_bfloat16(self) -> bool:
        return self.precision != "float32"

    @property
    def layout(self) -> Layout:
        if self.share_prompts:
            return "shared"
        return "packed" if self.packing else "padded"

    @property
    def uses_flash_attention(self) -> bool:
        return self.attention.startswith("flash")

    @model_validator(mode="after")
    def _fits_together(self) -> TrainingSection:
        if mistakes := [*_layout_mistakes(self), *_offload_mistakes(self)]:
            raise ValueError("\n".join(mistakes))
        return self


def _layout_mistakes(training: TrainingSection) -> Iterator[str]:
    if training.packing and training.share_prompts:
        yield (
            "share_prompts=true: gives every prompt a row with its answers, and packing=true puts all "
            "into one row; leave one of the two out"
        )
    if training.share_prompts and training.uses_flash_attention:
        yield (
            f"attention={training.attention}: takes no mask, which would keep the answers to a prompt apart; "
            "use sdpa, or share_prompts: false"
        )
    if training.sequence_parallel_size > 1 and training.share_prompts:
        yield (
            f"sequence_parallel_size={training.sequence_parallel_size}: takes no mask, which would keep the "
            "answers to a prompt apart; use share_prompts: false"
        )
    if training.sequence_parallel_size > 1 and training.packing and not training.uses_flash_attention:
        yield (
            f"sequence_parallel_size={training.sequence_parallel_size}: takes packed rows only with "
            "FlashAttention, which needs no mask; use packing: false, or attention: flash_attention_2"
        )


def _offload_mistakes(training: TrainingSection) -> Iterator[str]:
    stage = training.zero_stage
    if training.offload_optimizer != "none" and stage == 0:
        yield f"offload_optimizer={training.offload_optimizer}: wants ZeRO; use zero_stage: 1, 2 or 3"
    elif training.offload_optimizer == "nvme" and stage != 3:
        yield f"offload_optimizer=nvme: zero_stage={stage} offloads to the cpu only; use cpu, or zero_stage 3"
    if training.offload_parameters != "none" and stage != 3:
        yield (
            f"offload_parameters={training.offload_parameters}: at zero_stage={stage} every device needs all "
            "weights; use zero_stage: 3"
        )
    uses_nvme = "nvme" in (training.offload_optimizer, training.offload_parameters)
    if uses_nvme and training.nvme_path is None:
        yield "nvme_path: missing; name a folder on a fast disk of every node"
    if training.nvme_path is not None and not uses_nvme:
        yield (
            f"nvme_path={training.nvme_path}: nothing is offloaded there; use offload_optimizer: nvme, or "
            "leave it out"
        )


class EngineSection(Section):
    """The generation engine.

    dtype: `auto` is bfloat16, but float32 on a CPU that does not multiply bfloat16 numbers.
    """

    backend: Literal["vllm", "transformers"] = "vllm"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    max_num_seqs: Positive = 128
    tensor_parallel_size: Positive = 1
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1, description="share of a GPU; not used on CPU")
    cpu_kv_cache_gib: float = Field(1.0, gt=0, description="size of the KV cache on CPU")

    @property
    def number_format(self) -> Literal["bfloat16", "float32"]:
        """Of the weights and the KV cache."""
        return "float32" if self.dtype == "float32" else "bfloat16"


class SyncSection(Section):
    """When and how strictly the engine's weights are checked against the trainer's after a sync.

    tolerance: largest accepted mean |difference| of a probe's token log-probs, in nats. On prompts of a 135M
    model a bfloat16 engine and a bfloat16-autocast trainer differ by 0.05 to 0.1, wrong weights mostly by 0.5
    to 10. Staleness that hides below the tolerance is caught by following the trainer's movement
    (`rlhf_ray.weights.verify`).
    """

    verify_first: NonNegative = 2
    verify_every: Positive = 10
    tolerance: float = Field(0.25, gt=0)


Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


class RoleSection(Section):
    """What one role takes, and where. `auto` shares the machine: one GPU an actor where there are GPUs, else
    equal shares of the CPUs, every actor of a role with as many threads as the role has cores to itself while
    it works. With `online.max_lag` above 0 the engines have half of the cores, or as many as `engine.threads`
    says, and the other roles the rest.

    gpus: of each actor; below 1, other actors have the rest of that device.
    nodes: on how many nodes the actors are, equally many on each; for roles that share no devices.
    strategy: Ray's: on few nodes (PACK, the default) or many (SPREAD) if possible; on one, or each on
    another, or else not at all (STRICT_…).
    labels: that nodes must have, as `ray start --labels` gave them: `{pool: h100}`; a value may also be
    `in(a, b)`, `!a`, or `!in(a, b)`.
    """

    count: Positive = Field(1, description="ranks of a model, or engines")
    cpus: float | Literal["auto"] = "auto"
    gpus: float | Literal["auto"] = "auto"
    threads: Positive | Literal["auto"] = "auto"
    nodes: Positive | None = None
    strategy: Strategy | None = None
    labels: dict[str, str] = Field({}, description="label of a node -> what it must be")

    @model_validator(mode="after")
    def _fits_on_nodes(self) -> RoleSection:
        for key in ("cpus", "gpus"):
            amount = getattr(self, key)
            if amount != "auto" and amount < 0:
                raise ValueError(f"{key}={amount:g}: must be at least 0")
        if self.nodes is not None and self.strategy is not None:
            raise ValueError(
                f"strategy={self.strategy}: nodes={self.nodes} says it already; leave one of them out"
            )
        if self.nodes is not None and self.count % self.nodes:
            raise ValueError(
                f"nodes={self.nodes}: does not divide count={self.count}, and every node has equally many "
                "actors; change one of them"
            )
        return self


class SingleRoleSection(RoleSection):
    count: Literal[1] = 1


class FrozenRoleSection(RoleSection):
    """A model that is only read.

    backend: `torch` computes as the trainer does; with a count above 1 its ranks hold a part of the weights
    each (ZeRO 3). `vllm` asks engines of their own, as many as the count, which `engine` describes.
    """

    backend: Literal["torch", "vllm"] = "torch"


class PlacementSection(Section):
    """Which actors share devices.

    mode:
        auto: every actor has a share of its own; roles that must share a GPU, or the cores, take turns.
        colocated: all roles share the same devices, as many as the largest role has, and take turns: who
            waits moves its memory to the CPU (engines sleep, DeepSpeed's states are offloaded).
        disaggregated: the engines have devices of their own, and work beside the others if `online.max_lag`
            is above 0; all other roles share devices, in turn as above.
    Where roles share devices, `strategy` and `labels` are written once for all of them.
    """

    mode: Literal["auto", "colocated", "disaggregated"] = "auto"
    policy: RoleSection = RoleSection()
    critic: RoleSection = RoleSection()
    reference: FrozenRoleSection = FrozenRoleSection()
    reward: FrozenRoleSection = FrozenRoleSection()
    judge: SingleRoleSection = SingleRoleSection()
    engine: RoleSection = RoleSection()
    feedback: RoleSection = RoleSection()

    def pool_of(self, role: str) -> str:
        """Roles of the same pool share devices. role: `policy`, …, or a name of a feedback model."""
        if self.mode == "colocated":
            return "all"
        if self.mode == "disaggregated":
            return "generation" if role == "engine" else "training"
        return role

    def is_engine(self, role: str) -> bool:
        """Whether an actor of the role is an engine, which may have several devices."""
        if role in ("reference", "reward"):
            frozen: FrozenRoleSection = getattr(self, role)
            return frozen.backend == "vllm"
        return role not in ("policy", "critic")

    @model_validator(mode="after")
    def _pools_agree(self) -> PlacementSection:
        """What is said of a device is said once, or alike by all who share it."""
        if self.mode == "auto":
            return self
        mistakes, written = [], dict[tuple[str, str], tuple[str, object]]()
        for role in ROLES:
            section: RoleSection = getattr(self, role)
            if section.nodes is not None:
                mistakes.append(
                    f"{role}: nodes={section.nodes}: in mode {self.mode} roles share devices, and have no "
                    "nodes of their own; use strategy, or mode: auto"
                )
            for key in ("strategy", "labels"):
                value = getattr(section, key)
                if not value:
                    continue
                first, other = written.setdefault((self.pool_of(role), key), (role, value))
                if other != value:
                    mistakes.append(
                        f"{role}: {key}={value}: shares its devices with {first}, whose {key} is {other}; "
                        "write it once"
                    )
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self


ROLES = ("policy", "critic", "reference", "reward", "judge", "engine", "feedback")


class WandbSection(Section):
    project: str = "rlhf_ray"
    mode: Literal["online", "offline"] = "offline"
    api_key: SecretStr | None = Field(
        None, description="better left to the environment variable WANDB_API_KEY"
    )


class LoggingSection(Section):
    wandb: WandbSection | None = None
    tensorboard: bool = False


class ClusterSection(Section):
    """address: null starts Ray on this machine for the run; `auto` or host:port joins a running cluster.
    max_restarts: how often in a row, without a new step between, lost processes are started again before the
    run fails; 0 lets it fail at the first.
    """

    address: str | None = None
    object_store_mib: Positive = 500
    start_timeout: Positive = Field(300, description="seconds to wait for resources and for actors to start")
    call_timeout: Positive = Field(3600, description="seconds after which a call to a role counts as hung")
    heartbeat_timeout: Annotated[int, Field(ge=10)] = Field(
        60, description="seconds without a sign of life after which a process counts as dead"
    )
    max_restarts: NonNegative = 3
