"""DeepSpeed around one model: the only place where DeepSpeed is imported and configured.

Gradients accumulate in float32 over any number of `backward` calls until `step`; the loss handed to
`backward` is this rank's part of a sum that is already divided by the global denominator, so gradients are
summed over ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from rlhf_ray.config.schema import OptimizerSection, TrainingSection
from rlhf_ray.engines.partitioned import loading_in_parts
from rlhf_ray.engines.random_state import load_random_state, random_path, save_random_state
from rlhf_ray.engines.resting import DeviceState, offload_config
from rlhf_ray.errors import CheckpointError
from rlhf_ray.weights.source import ModuleWeightSource

T = TypeVar("T")
LAYOUT_FILE = "layout.json"


@dataclass(frozen=True)
class World:
    """This process's place in its group of trainer ranks.

    Fields:
        master: host:port of rank 0's rendezvous.
        threads: CPU threads of this process.
        nodes: of each rank, numbered from 0; ranks of a node follow each other. Empty where there is one.
    """

    rank: int
    size: int
    master: str
    threads: int
    use_gpu: bool
    nodes: tuple[int, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """What torch and DeepSpeed read of a rank and its node."""
        host, port = self.master.rsplit(":", 1)
        nodes = self.nodes or (0,) * self.size
        node = nodes[self.rank]
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            # As an index of devices: Ray shows an actor only its own GPU. Without GPUs it is what it says.
            "LOCAL_RANK": "0" if self.use_gpu else str(nodes[: self.rank].count(node)),
            "LOCAL_SIZE": str(nodes.count(node)),
            "LOCAL_WORLD_SIZE": str(nodes.count(node)),
            "NODE_RANK": str(node),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
        }

    @property
    def device(self) -> torch.device:
        # Ray shows an actor only its own GPU, so the local index is always 0.
        return torch.device("cuda", 0) if self.use_gpu else torch.device("cpu")


def init_world(world: World) -> None:
    """Join the process group, once a process: DeepSpeed cannot join again after `leave_world`.

    Sets what DeepSpeed reads from the environment before it is imported.
    """
    os.environ.update(world.environment)
    if not world.use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(world.threads)
    import deepspeed

    if not world.use_gpu:
        # Otherwise the first collective compiles a shared-memory operator for half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "nccl" if world.use_gpu else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        rank=world.rank,
        world_size=world.size,
    )


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def gather_objects(part: T, num_ranks: int) -> list[T]:
    """Every rank's part, in the order of ranks, on every rank."""
    if num_ranks == 1:
        return [part]
    parts: list[T | None] = [None] * num_ranks
    dist.all_gather_object(parts, part)
    return parts  # type: ignore[return-value]


class TrainEngine:
    """A module, its AdamW and its schedule under ZeRO 0 to 3.

    Args:
        build: makes the module; at stage 3 what it loads is in parts already, each rank having its own.
        total_steps: optimizer steps of the whole run, for the schedule.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        optimizer: OptimizerSection,
        training: TrainingSection,
        world: World,
        total_steps: int,
    ) -> None:
        import deepspeed

        self.world = world
        self.uses_bfloat16 = training.uses_bfloat16
        self.zero_stage = training.zero_stage
        self.lora = training.lora
        config = self._deepspeed_config(optimizer, training)
        with loading_in_parts(config, enabled=self.zero_stage == 3):
            module = build().to(world.device)
        if training.gradient_checkpointing:
            assert isinstance(module.model, PreTrainedModel)
            # See `token_stats` on frozen weights.
            reentrant = training.lora is not None
            module.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
        # Fused, a step of a 135M model takes a tenth of a second on a CPU, and else seven.
        adam = torch.optim.AdamW(
            _parameter_groups(module, optimizer.weight_decay),
            lr=optimizer.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self._unscaled_norm = 0.0
        if self.zero_stage == 0:
            # At stage 0 DeepSpeed clips but forgets the norm.
            adam.register_step_pre_hook(lambda *_: self._clip(module, optimizer.max_grad_norm))
        self.engine, self.optimizer, _, self.scheduler = deepspeed.initialize(
            model=module,
            optimizer=adam,
            lr_scheduler=lambda opt: torch.optim.lr_scheduler.LambdaLR(
                opt, _schedule(optimizer, total_steps)
            ),
            config=config,
        )
        self.state_on_device = DeviceState(self.engine, training, world.device)
        if self.zero_stage == 0 and world.size == 1:
            # With nobody to add up with, the all-reduce still copies every gradient twice: seconds a step on
            # a CPU.
            self.engine.enable_backward_allreduce = False

    def _deepspeed_config(self, optimizer: OptimizerSection, training: TrainingSection) -> dict[str, object]:
        return {
            "train_micro_batch_size_per_gpu": 1,
            # Every step() is a boundary: the number of micro-batches varies with their lengths.
            "managed_gradient_accumulation": False,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0 if self.zero_stage == 0 else optimizer.max_grad_norm,
            "zero_optimization": {
                "stage": self.zero_stage,
                "overlap_comm": False,
                # Keep small tensors (norms, biases) whole instead of gathering each of them.
                "stage3_param_persistence_threshold": 10_000,
                **offload_config(training, pin_memory=self.world.use_gpu),
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 30,
        }

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    @contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast(
            self.world.device.type,
            dtype=torch.bfloat16,
            enabled=self.uses_bfloat16,
            # What autocast keeps would be the whole model on every rank, of which ZeRO 3 keeps a part.
            cache_enabled=self.zero_stage < 3,
        ):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate this rank's gradients. DeepSpeed averages over ranks; the losses are parts of a sum."""
        self.engine.backward(loss * self.world.size)

    def step(self) -> float:
        """Clip, update, advance the schedule; returns the gradient norm before clipping."""
        self.engine.step()
        norm = self._unscaled_norm if self.zero_stage == 0 else self.engine.get_global_grad_norm()
        return float(norm)

    def _clip(self, module: nn.Module, max_norm: float) -> None:
        self._unscaled_norm = float(nn.utils.clip_grad_norm_(module.parameters(), max_norm))

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def gather_objects(self, part: T) -> list[T]:
        return gather_objects(part, self.world.size)

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Name in a checkpoint -> whole tensor on CPU, adapters merged, on rank 0 ({} elsewhere)."""
        assert isinstance(self.module.model, nn.Module)
        source = ModuleWeightSource(self.module.model, torch.float32, self.zero_stage)
        return {name: tensor.to("cpu", copy=True) for name, tensor in source if self.world.rank == 0}

    def trained_state_dict(self) -> dict[str, torch.Tensor]:
        """Name in the model -> whole tensor on CPU of every trained parameter on rank 0 ({} elsewhere)."""
        import deepspeed

        state: dict[str, torch.Tensor] = {}
        for name, parameter in self.module.model.named_parameters():  # type: ignore[union-attr]
            if not parameter.requires_grad:
                continue
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage == 3):
                if self.world.rank == 0:
                    state[name] = parameter.detach().to("cpu", copy=True)
        return state

    def save_state(self, folder: Path) -> None:
        self.engine.save_checkpoint(
            str(folder),
            tag="state",
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        save_random_state(random_path(folder, self.world.rank))
        if self.world.rank == 0:
            (folder / LAYOUT_FILE).write_text(json.dumps(self._layout))

    @property
    def _layout(self) -> dict[str, object]:
        """What has to be equal for a state to be loaded: each rank reads its own part of the optimizer."""
        lora = self.lora.model_dump(mode="json") if self.lora else None
        return {"ranks": self.world.size, "zero_stage": self.zero_stage, "lora": lora}

    def load_state(self, folder: Path) -> None:
        """
        Raises:
            CheckpointError: the folder does not hold a state of this world size, ZeRO stage and adapter.
        """
        path = folder / LAYOUT_FILE
        if not path.exists():
            raise CheckpointError(f"{folder}: no state there")
        saved = json.loads(path.read_text())
        if saved["lora"] != self._layout["lora"]:
            raise CheckpointError(
                f"{folder}: saved with training.lora={saved['lora']}, and cannot be loaded with "
                f"{self._layout['lora']}; resume with the training.lora of the first run"
            )
        if saved != self._layout:
            raise CheckpointError(
                f"{folder}: saved by {saved['ranks']} ranks at ZeRO {saved['zero_stage']}, and cannot be "
                f"loaded into {self.world.size} at ZeRO {self.zero_stage}; resume with the placement and the "
                "training.zero_stage of the first run"
            )
        try:
            with no_foreign_code():
                self.engine.load_checkpoint(
                    # What is frozen is not part of the state.
                    str(folder),
                    tag="state",
                    load_module_strict=self.lora is None,
                )
            load_random_state(random_path(folder, self.world.rank))
        except (OSError, RuntimeError, AssertionError, KeyError, EOFError, UnpicklingError) as error:
            raise CheckpointError(
                f"{folder}: damaged: {error}; remove it to resume from an earlier one"
            ) from error


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """What is trained; decay matrices, not norms and biases."""
    trained = [p for p in module.parameters() if p.requires_grad]
    # DeepSpeed takes no empty group.
    # At ZeRO 3 a parameter's own shape is that of nothing.
    is_matrix = {p: len(getattr(p, "ds_shape", p.shape)) >= 2 for p in trained}
    groups = {decays: [p for p in trained if is_matrix[p] == decays] for decays in (True, False)}
    if weight_decay == 0:
        groups = {False: trained}
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for decays, parameters in groups.items()
        if parameters
    ]


def _schedule(optimizer: OptimizerSection, total_steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at an optimizer step: linear warm-up, then constant, or down to 0."""

    def factor(step: int) -> float:
        if step < optimizer.warmup_steps:
            return (step + 1) / optimizer.warmup_steps
        progress = (step - optimizer.warmup_steps) / max(1, total_steps - optimizer.warmup_steps)
        if optimizer.lr_scheduler == "linear":
            return max(0.0, 1.0 - progress)
        if optimizer.lr_scheduler == "cosine":
            return 0.5 * (1.0 + float(np.cos(np.pi * min(1.0, progress))))
        return 1.0

    return factor


@contextmanager
def no_foreign_code() -> Iterator[None]:
    """DeepSpeed's files are pickles, which may run anything when they are read. In the block torch reads
    tensors, plain values and these classes of DeepSpeed alone, whatever DeepSpeed asks it for."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
