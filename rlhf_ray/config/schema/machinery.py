"""What a run stands on, whatever it trains: training, engines, placement, logging, cluster."""

from __future__ import annotations

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


class TrainingSection(Section):
    """How every trained model (policy, critic, reward model) is trained.

    precision: `mixed` is float32 master weights with bfloat16 autocast; `float32` is exact and slow.
    tokens_per_micro_batch: budget of padded tokens in one forward/backward; raises or lowers memory, never
    the result.
    packing: sequences of a micro-batch in one row, without padding; pays with FlashAttention on a GPU.
    share_prompts: in the online stage, the answers to a prompt stand behind it in one row, and it is computed
    once for all of them that a micro-batch has, with the same result. Pays where num_generations is large and
    answers are not much longer than prompts. For models whose every layer has full attention.
    lora: null trains all weights. Adapters want a learning rate about ten times that of all weights.
    """

    precision: Literal["mixed", "float32"] = "mixed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    tokens_per_micro_batch: Positive = 4096
    packing: bool = False
    share_prompts: bool = False
    gradient_checkpointing: bool = False
    lora: LoraSection | None = None

    @property
    def lockstep_tokens(self) -> int | None:
        """The most tokens of a forward, where all ranks must take equally many steps through each of them."""
        return self.tokens_per_micro_batch if self.zero_stage == 3 else None

    @property
    def layout(self) -> Layout:
        if self.share_prompts:
            return "shared"
        return "packed" if self.packing else "padded"

    @model_validator(mode="after")
    def _one_layout(self) -> TrainingSection:
        if self.packing and self.share_prompts:
            raise ValueError(
                "share_prompts=true: gives every prompt a row with its answers, and packing=true puts all "
                "into one row; leave one of the two out"
            )
        return self


class EngineSection(Section):
    """The generation engine."""

    backend: Literal["vllm", "transformers"] = "vllm"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_num_seqs: Positive = 128
    tensor_parallel_size: Positive = 1
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1, description="share of a GPU; not used on CPU")
    cpu_kv_cache_gib: float = Field(1.0, gt=0, description="size of the KV cache on CPU")


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


class RoleSection(Section):
    """What one role takes. `auto` shares the machine: one GPU an actor where there are GPUs, else equal
    shares of the CPUs, every actor of a role with as many threads as the role has cores to itself while it
    works. With `online.max_lag` above 0 the engines have half of the cores, or as many as `engine.threads`
    says, and the other roles the rest."""

    count: Positive = Field(1, description="ranks of a trained model, or engines")
    cpus: float | Literal["auto"] = "auto"
    gpus: float | Literal["auto"] = "auto"
    threads: Positive | Literal["auto"] = "auto"


class SingleRoleSection(RoleSection):
    count: Literal[1] = 1


class PlacementSection(Section):
    policy: RoleSection = RoleSection()
    critic: RoleSection = RoleSection()
    reference: SingleRoleSection = SingleRoleSection()
    reward: SingleRoleSection = SingleRoleSection()
    judge: SingleRoleSection = SingleRoleSection()
    engine: RoleSection = RoleSection()
    feedback: RoleSection = RoleSection()


class WandbSection(Section):
    project: str = "rlhf_ray"
    mode: Literal["online", "offline"] = "offline"
    api_key: SecretStr | None = Field(
        None, description="better left to the environment variable WANDB_API_KEY"
    )


class LoggingSection(Section):
    wandb: WandbSection | None = None
    tensorboard: bool = False


class CheckpointSection(Section):
    """every: optimizer or RL steps between checkpoints of a stage; null saves only on Ctrl-C."""

    every: Positive | None = 50
    keep_last: Positive = 1


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
