"""The configuration of a run. Frozen; unknown keys are errors; every default is written here and nowhere
else.

A file has one section a stage (`sft`, `preferences`, `reward`, `online`) and `pipeline`, the order in which
they run. With one stage section, `pipeline` may be left out. Within a pipeline a stage that names no model
takes the newest one that an earlier stage made, and the top-level `model` if there is none; `reward.dataset`
is by default what `preferences` wrote, and a reward source of type `model` without a path is what `reward`
trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

EMBEDDED_MODEL = "embedded:smollm2-135m-instruct"
EMBEDDED_TEMPLATE = "embedded:chatml"
StageName = Literal["sft", "preferences", "reward", "online"]
STAGES: tuple[StageName, ...] = ("sft", "preferences", "reward", "online")

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelSection(Section):
    """
    path: a Hugging Face folder, a hub name, a `.gguf` file, or the embedded model.
    chat_template: a Jinja file that replaces the tokenizer's own template, or `embedded:chatml`: ChatML
    without a system prompt. It is saved with what is trained.
    """

    path: str = EMBEDDED_MODEL
    chat_template: str | None = None
    trust_remote_code: bool = False


class DatasetSection(Section):
    """path: a JSONL, JSON, CSV or Parquet file (also .gz), a hub name, or
    `embedded:prompts|demonstrations`."""

    path: str
    split: str = "train"
    name: str | None = Field(None, description="the hub dataset's configuration")
    limit: Positive | None = Field(
        None, description="use only the first rows, after shuffling by the run's seed"
    )


class OptimizerSection(Section):
    """AdamW."""

    learning_rate: float = Field(1e-5, gt=0, lt=1)
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegative = 0
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)


class TrainingSection(Section):
    """How every trained model (policy, critic, reward model) is trained.

    precision: `mixed` is float32 master weights with bfloat16 autocast; `float32` is exact and slow.
    tokens_per_micro_batch: budget of padded tokens in one forward/backward; raises or lowers memory, never
    the result.
    packing: sequences of a micro-batch in one row, without padding; pays with FlashAttention on a GPU.
    """

    precision: Literal["mixed", "float32"] = "mixed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    tokens_per_micro_batch: Positive = 4096
    packing: bool = False
    gradient_checkpointing: bool = False


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


class SFTSection(Section):
    """Supervised fine-tuning on assistant turns."""

    model: ModelSection | None = None
    dataset: DatasetSection
    eval_dataset: DatasetSection | None = None
    num_epochs: Positive = 1
    max_steps: Positive | None = Field(None, description="stop early, whatever num_epochs says")
    batch_size: Positive = 16
    max_length: Positive = 512
    eval_every: Positive | None = None
    optimizer: OptimizerSection = OptimizerSection(learning_rate=2e-5)


class SimulatedAnnotator(Section):
    """Prefers the answer with the higher gold reward, with noise.

    P(prefers a over b) = (1 - error_rate) * sigmoid((gold(a) - gold(b)) / temperature) + error_rate / 2;
    temperature 0 is a deterministic annotator.
    """

    type: Literal["simulated"] = "simulated"
    name: str = "simulated"
    function: str = Field("rlhf_ray.rewards.gold:friendliness", description="import path of the gold reward")
    temperature: float = Field(0.0, ge=0)
    error_rate: Fraction = 0.0


class FileAnnotator(Section):
    """Existing human preferences: a dataset with chosen and rejected, instead of generated answers."""

    type: Literal["file"]
    name: str = "human"
    dataset: DatasetSection


Annotator = Annotated[SimulatedAnnotator | FileAnnotator, Field(discriminator="type")]


class PreferencesSection(Section):
    """Answers prompts several times and asks annotators which answer is better."""

    model: ModelSection | None = None
    dataset: DatasetSection | None = Field(None, description="prompts; none if all annotators are files")
    annotators: tuple[Annotator, ...] = (SimulatedAnnotator(),)
    num_generations: Annotated[int, Field(ge=2)] = 4
    pairs_per_prompt: Positive = 2
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_completion_length: Positive = 64
    prompts_per_step: Positive = 32


class RewardSection(Section):
    """Reward model from preference pairs: Bradley-Terry, -log sigmoid(r_chosen - r_rejected - margin)."""

    model: ModelSection | None = None
    dataset: DatasetSection | None = None
    held_out: float = Field(0.15, gt=0, description="for evaluation: a fraction below 1, or a count")
    split_by: Literal["prompt", "first_turn"] = Field(
        "prompt", description="what pairs may not share across the split"
    )
    num_epochs: Positive = 1
    max_steps: Positive | None = None
    batch_size: Positive = Field(16, description="pairs an optimizer step")
    max_length: Positive = 512
    use_margin: bool = Field(False, description="use the dataset's column `margin`")
    center_rewards_coefficient: float = Field(0.0, ge=0)
    eval_every: Positive | None = None
    optimizer: OptimizerSection = OptimizerSection(learning_rate=1e-5, lr_scheduler="linear")


class ModelReward(Section):
    """A trained reward model; without a path, the one that this pipeline's `reward` stage made."""

    type: Literal["model"]
    name: str = "proxy"
    path: str | None = None
    weight: float = 1.0


class FunctionReward(Section):
    """A Python function `f(prompts, completions, **columns) -> list[float | None]` by import path
    `module:name`.

    With weight 0 it is computed and shown, and not trained on: a gold score beside the proxy.
    """

    type: Literal["function"]
    name: str
    function: str
    weight: float = 1.0


Reward = Annotated[ModelReward | FunctionReward, Field(discriminator="type")]


class OnlineSection(Section):
    """Reinforcement learning on the policy's own samples: PPO with a critic.

    KL to the reference: `kl_placement: reward` subtracts kl_coef * k1 from every token's reward;
    `loss` adds kl_coef * (k2 or k3) to the loss. With `kl_target`, kl_coef adapts (Ziegler et al. 2019,
    section 2.2).
    """

    algorithm: Literal["ppo"] = "ppo"
    model: ModelSection | None = None
    reference: ModelSection | None = Field(None, description="default: the model that training starts from")
    dataset: DatasetSection
    eval_dataset: DatasetSection | None = None
    rewards: tuple[Reward, ...] = Field(min_length=1)

    num_steps: Positive
    prompts_per_step: Positive = 64
    num_generations: Positive = 1
    max_completion_length: Positive = 64
    max_prompt_length: Positive = 512
    temperature: float = Field(1.0, gt=0)

    num_ppo_epochs: Positive = 1
    num_mini_batches: Positive = 1
    cliprange: float = Field(0.2, gt=0)
    cliprange_value: float | None = Field(0.2, gt=0, description="null switches value clipping off")
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    entropy_coef: float = Field(0.0, ge=0)
    loss_aggregation: Literal["token", "sequence"] = Field(
        "token",
        description="mean over all tokens of the batch, or mean over sequences of each one's token mean",
    )

    kl_coef: float = Field(0.05, ge=0)
    kl_placement: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_target: float | None = Field(None, gt=0, description="nats a sequence")
    kl_horizon: Positive = Field(10_000, description="samples over which the adaptive kl_coef moves")

    missing_eos_penalty: float = Field(0.0, ge=0)
    reward_clip: float | None = Field(None, gt=0)
    normalize_rewards: bool = Field(False, description="by the running standard deviation")
    whiten_rewards: bool = False
    whiten_advantages: bool = True

    critic_init: Literal["reward", "policy"] = "reward"
    critic_warmup_steps: NonNegative = Field(0, description="first steps that train only the critic")
    optimizer: OptimizerSection = OptimizerSection(learning_rate=3e-6)
    critic_optimizer: OptimizerSection = OptimizerSection(learning_rate=1e-5)

    eval_every: Positive | None = None

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.num_generations

    @model_validator(mode="after")
    def _consistent(self) -> OnlineSection:
        mistakes = []
        if self.kl_placement == "reward" and self.kl_estimator != "k1":
            mistakes.append(
                f"kl_estimator={self.kl_estimator}: in the reward only k1 is unbiased; "
                "use k1, or kl_placement: loss"
            )
        if self.kl_placement == "loss" and self.kl_estimator == "k1":
            mistakes.append(
                "kl_estimator=k1: its gradient in the loss does not depend on the reference (it is zero in "
                "expectation); use k2 or k3, or kl_placement: reward"
            )
        if self.samples_per_step % self.num_mini_batches:
            mistakes.append(
                f"num_mini_batches={self.num_mini_batches}: does not divide "
                f"prompts_per_step * num_generations = {self.samples_per_step}"
            )
        if self.critic_init == "reward" and not any(r.type == "model" for r in self.rewards):
            mistakes.append(
                "critic_init=reward: none of the rewards is of type model; use critic_init: policy"
            )
        if all(reward.weight == 0 for reward in self.rewards):
            mistakes.append("rewards: every weight is 0, so there is nothing to train on")
        if self.critic_warmup_steps >= self.num_steps:
            mistakes.append(
                f"critic_warmup_steps={self.critic_warmup_steps}: the policy would never be trained in "
                f"num_steps={self.num_steps}; use fewer"
            )
        if self.kl_target is not None and self.samples_per_step >= 5 * self.kl_horizon:
            mistakes.append(
                f"kl_horizon={self.kl_horizon}: so short that kl_coef could fall below 0 in one step; "
                f"use more than {self.samples_per_step // 5}"
            )
        names = [reward.name for reward in self.rewards]
        if len(set(names)) != len(names):
            mistakes.append(f"rewards: names must differ, these do not: {', '.join(names)}")
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self


class RoleSection(Section):
    """What one role takes. `auto` shares the machine: one GPU an actor where there are GPUs, else equal
    shares of the CPUs, every actor of a role with as many threads as the role has cores to itself while it
    works."""

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
    engine: RoleSection = RoleSection()


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
    """address: null starts Ray on this machine for the run; `auto` or host:port joins a running cluster."""

    address: str | None = None
    object_store_mib: Positive = 500
    start_timeout: Positive = Field(300, description="seconds to wait for resources and for actors to start")
    call_timeout: Positive = Field(3600, description="seconds after which a call to a role counts as hung")


class RunConfig(Section):
    output_dir: Path
    seed: NonNegative = 0
    resume: Literal["never", "auto"] = "never"
    model: ModelSection = ModelSection()
    pipeline: tuple[StageName, ...] = ()

    sft: SFTSection | None = None
    preferences: PreferencesSection | None = None
    reward: RewardSection | None = None
    online: OnlineSection | None = None

    training: TrainingSection = TrainingSection()
    engine: EngineSection = EngineSection()
    sync: SyncSection = SyncSection()
    placement: PlacementSection = PlacementSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    cluster: ClusterSection = ClusterSection()

    @property
    def stages(self) -> tuple[StageName, ...]:
        """The stages in the order in which they run."""
        return self.pipeline or tuple(name for name in STAGES if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _complete(self) -> RunConfig:
        present = [name for name in STAGES if getattr(self, name) is not None]
        mistakes = []
        if not present:
            mistakes.append(f"no stage: add one of the sections {', '.join(STAGES)}")
        if len(present) > 1 and not self.pipeline:
            mistakes.append(f"pipeline: missing; say in which order to run {', '.join(present)}")
        mistakes += [
            f"pipeline: '{name}' has no section of its own" for name in self.pipeline if name not in present
        ]
        mistakes += [
            f"{name}: not in pipeline" for name in present if self.pipeline and name not in self.pipeline
        ]
        if len(set(self.pipeline)) != len(self.pipeline):
            mistakes.append("pipeline: a stage may appear once")
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self
