"""One rank of a model that is being trained, whatever its objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ray.algorithms.metrics import MetricSums, finalise, merge, pack, unpack
from rlhf_ray.config.schema import Layout, OptimizerSection, TrainingSection
from rlhf_ray.engines.deepspeed_engine import TrainEngine, World, init_world, leave_world
from rlhf_ray.engines.random_state import seed_everything
from rlhf_ray.engines.sequence_parallel import SequenceGroup
from rlhf_ray.models.adapters import add_adapter, save_adapter
from rlhf_ray.models.batching import TokenBatch, same_prompts
from rlhf_ray.models.heads import PolicyModel, ScalarModel
from rlhf_ray.models.inference import forward_rows, in_row_order
from rlhf_ray.models.loading import save_model_folder
from rlhf_ray.models.planning import plan_micro_batches
from rlhf_ray.models.row_attention import attend_by_rows
from rlhf_ray.models.sharing import check_sharing
from rlhf_ray.reporting.files import naming_a_full_disk
from rlhf_ray.seeds import derive_seed
from rlhf_ray.types import Metrics, Ragged, Rows

ADAPTER_FOLDER = "adapter"
"""In the folder of a model that was trained with adapters."""

BatchT = TypeVar("BatchT", bound=Rows)
BatchT_contra = TypeVar("BatchT_contra", bound=Rows, contravariant=True)


class Objective(Protocol[BatchT_contra]):
    """What is minimised. Sums over rows, so that any split of a batch gives the same gradient."""

    def lengths(self, batch: BatchT_contra) -> NDArray[np.int64]:
        """[B] tokens of each row in the forward pass."""
        ...

    def prompts(self, batch: BatchT_contra) -> Ragged | None:
        """With what the rows begin, which equal ones may share; None where they share nothing."""
        ...

    def denominator(self, batch: BatchT_contra) -> float:
        """What the summed loss of the whole batch is divided by."""
        ...

    def loss(
        self, model: nn.Module, rows: BatchT_contra, layout: Layout, device: torch.device
    ) -> tuple[torch.Tensor, MetricSums]:
        """Sum over the given rows (perhaps none), with gradient; and the metrics of these rows."""
        ...


@dataclass(frozen=True)
class WorkerSpec:
    """What every trained model needs to know, whatever its role."""

    optimizer: OptimizerSection
    training: TrainingSection
    world: World
    total_steps: int
    seed: int


class ModelWorker:
    """Args: name: prefix of this model's metrics (`policy`, `critic`, `reward`)."""

    def __init__(
        self,
        name: str,
        build: Callable[[], PolicyModel | ScalarModel],
        tokenizer: PreTrainedTokenizerBase,
        spec: WorkerSpec,
    ) -> None:
        init_world(spec.world)
        self.name = name
        self.spec = spec
        self.world = spec.world
        self.num_sharing = spec.training.sequence_parallel_size
        """Ranks that compute the same rows."""
        self.tokenizer = tokenizer

        def adapted() -> nn.Module:
            module = build()
            if spec.training.lora is not None:
                add_adapter(module, spec.training.lora, spec.seed)
            if self.num_sharing > 1:
                module.sequence_group = SequenceGroup(
                    module.model, self.world.rank, self.world.size, self.num_sharing
                )
            return module

        self.engine = TrainEngine(adapted, spec.optimizer, spec.training, spec.world, spec.total_steps)
        model = self.engine.module.model
        assert isinstance(model, PreTrainedModel)
        if spec.training.share_prompts:
            check_sharing(model)
        elif spec.training.packing:
            attend_by_rows(model)
        seed_everything(derive_seed(spec.seed, spec.world.rank))

    def update(
        self,
        objective: Objective[BatchT],
        batch: BatchT,
        num_mini_batches: int = 1,
        num_epochs: int = 1,
        step: int = 0,
    ) -> Metrics:
        """Train on a batch: `num_epochs` passes of `num_mini_batches` optimizer steps each.

        Prompts, with all their rows, are shuffled for every pass by (seed, step): alike on every rank, and in
        a resumed run.
        """
        self.engine.engine.train()
        generator = np.random.default_rng([self.spec.seed, step])
        prompts = objective.prompts(batch)
        groups = np.arange(len(batch)) if prompts is None else same_prompts(prompts)
        sums: list[MetricSums] = []
        grad_norms: list[float] = []
        for _ in range(num_epochs):
            order = shuffled(groups, generator) if num_mini_batches > 1 else np.arange(len(batch))
            for rows in np.array_split(order, num_mini_batches):
                sums.append(self._accumulate(objective, batch.select(rows)))
                learning_rate = self.engine.learning_rate
                grad_norms.append(self.engine.step())
        return {
            **self._reduce(sums),
            f"{self.name}/grad_norm": float(np.mean(grad_norms)),
            f"{self.name}/learning_rate": learning_rate,
        }

    def _accumulate(self, objective: Objective[BatchT], batch: BatchT) -> MetricSums:
        """Forward and backward over this rank's micro-batches of one optimizer step."""
        # Where rewards failed, nothing of a batch may be trained on; its sum is 0, and must not become NaN.
        denominator = objective.denominator(batch) or 1.0
        sums = []
        for rows in self._my_micro_batches(objective.lengths(batch), objective.prompts(batch)):
            with self.engine.autocast():
                loss, metrics = self._loss(objective, batch.select(rows))
            self.engine.backward(loss / denominator)
            sums.append(metrics)
        return merge(sums)

    def evaluate(self, objective: Objective[BatchT], batch: BatchT) -> Metrics:
        """The objective's metrics without training."""
        self.engine.engine.eval()
        sums = []
        for rows in self._my_micro_batches(objective.lengths(batch), objective.prompts(batch)):
            with torch.no_grad(), self.engine.autocast():
                _, metrics = self._loss(objective, batch.select(rows))
            sums.append(metrics)
        return self._reduce(sums)

    def _loss(self, objective: Objective[BatchT], rows: BatchT) -> tuple[torch.Tensor, MetricSums]:
        return objective.loss(self.engine.engine, rows, self.spec.training.layout, self.world.device)

    def _my_micro_batches(self, lengths: NDArray[np.int64], prompts: Ragged | None) -> list[list[int]]:
        training = self.spec.training
        shared = prompts if training.share_prompts else None
        num_groups, budget = self.world.size // self.num_sharing, training.tokens_per_micro_batch
        plan = plan_micro_batches(
            lengths, num_groups, budget * self.num_sharing, shared, packed=training.packing
        )
        return plan[self.world.rank // self.num_sharing]

    def _reduce(self, parts: list[MetricSums]) -> Metrics:
        merged = merge(parts)
        if self.world.size > 1:
            sums, maxima = (tensor.to(self.world.device) for tensor in pack(merged))
            if self.world.rank % self.num_sharing:
                sums.zero_()  # those who share rows count them once
            dist.all_reduce(sums)
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
            merged = unpack(merged, sums.cpu(), maxima.cpu())
        return finalise(merged)

    def forward_all(
        self,
        forward: Callable[[TokenBatch], torch.Tensor],
        sequences: Ragged,
        is_source: NDArray[np.bool_],
        prompts: Ragged | None = None,
    ) -> Ragged:
        """Values at the selected positions, in order, on every rank; each computes a share of the rows.

        Args:
            prompts: with what the sequences begin, where equal ones may be shared.
        """
        self.engine.engine.eval()
        with self.engine.autocast():
            part = forward_rows(
                forward,
                sequences,
                is_source,
                self._my_micro_batches(sequences.lengths, prompts),
                self.spec.training.layout,
                self.world.device,
                prompts,
            )
        return in_row_order(self.engine.gather_objects(part))

    def save_model(self, folder: Path) -> None:
        """Write a Hugging Face folder; of a model with adapters these are merged, and are in `adapter/`
        too."""
        state = self.engine.full_state_dict()
        trained = self.engine.trained_state_dict() if self.spec.training.lora is not None else {}
        if self.world.rank == 0:
            model = self.engine.module.model
            assert isinstance(model, PreTrainedModel)
            with naming_a_full_disk(folder):
                save_model_folder(model, state, self.tokenizer, folder)
                if trained:
                    save_adapter(model, trained, folder / ADAPTER_FOLDER)

    def save_state(self, folder: Path) -> None:
        with naming_a_full_disk(folder):
            self.engine.save_state(folder)

    def load_state(self, folder: Path) -> None:
        self.engine.load_state(folder)

    def rest(self) -> None:
        """Give the device to others: nothing else may be asked before `wake`."""
        self.engine.state_on_device.rest()

    def wake(self, weights_only: bool = False) -> None:
        """weights_only: is for engines."""
        self.engine.state_on_device.wake()

    def close(self) -> None:
        leave_world()


def shuffled(groups: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """[B] rows, group after group in random order. groups: [B], numbered from 0."""
    place = np.argsort(generator.permutation(groups.max(initial=-1) + 1))
    return np.argsort(place[groups], kind="stable")
