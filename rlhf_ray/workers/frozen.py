"""Models that are only read: the reference of the KL penalty, and reward models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.config.schema import ModelSection, TrainingSection
from rlhf_ray.engines.deepspeed_engine import World, gather_objects, init_world, leave_world
from rlhf_ray.engines.partitioned import FrozenParts, whole
from rlhf_ray.models.batching import TokenBatch, before_responses, last_positions
from rlhf_ray.models.heads import PolicyModel, ScalarModel
from rlhf_ray.models.inference import forward_rows, in_row_order, row_totals
from rlhf_ray.models.loading import load_policy_model, load_scalar_model
from rlhf_ray.models.planning import plan_micro_batches
from rlhf_ray.models.row_attention import attend_by_rows
from rlhf_ray.models.sharing import check_sharing
from rlhf_ray.types import Ragged, Rollouts, TwoAnswers

Referenced = TypeVar("Referenced", bound=TwoAnswers)


class FrozenModel:
    """Forward passes with the trainer's own precision, so that equal weights give equal numbers.

    Args:
        world: of ranks that hold a part of the model each, and compute a share of the rows; None where this
            process has all of it.
    """

    def __init__(
        self,
        build: Callable[[], PolicyModel | ScalarModel],
        training: TrainingSection,
        device: torch.device,
        world: World | None = None,
    ) -> None:
        self.training = training
        self.device = device
        self.world = world
        self.module: torch.nn.Module | FrozenParts
        built: list[PolicyModel | ScalarModel] = []

        def kept() -> torch.nn.Module:
            built.append(build())
            return built[0]

        if world is None:
            self.module = kept().eval().requires_grad_(False).to(device)
        else:
            init_world(world)
            self.module = FrozenParts(kept, device)
        self.model = built[0].model
        if training.share_prompts and isinstance(built[0], PolicyModel):
            check_sharing(self.model)
        elif training.packing:
            attend_by_rows(self.model)

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.training.uses_bfloat16)

    def rest(self) -> None:
        self.module.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        self.module.to(self.device)

    def forward_all(
        self,
        sequences: Ragged,
        is_source: NDArray[np.bool_],
        prompts: Ragged | None = None,
        **options: float,
    ) -> Ragged:
        """As `ModelWorker.forward_all`. options: of the module's forward."""

        def forward(batch: TokenBatch) -> torch.Tensor:
            out = self.module(batch, **options)
            return out if isinstance(out, torch.Tensor) else out.logprobs

        training, (rank, size) = self.training, self._place
        shared = prompts if training.share_prompts else None
        plan = plan_micro_batches(
            sequences.lengths, size, training.tokens_per_micro_batch, shared, packed=training.packing
        )
        with self.autocast():
            part = forward_rows(
                forward, sequences, is_source, plan[rank], training.layout, self.device, prompts
            )
        return in_row_order(gather_objects(part, size))

    @property
    def _place(self) -> tuple[int, int]:
        """Rank and number of ranks."""
        return (0, 1) if self.world is None else (self.world.rank, self.world.size)


class FrozenScores(FrozenModel):
    """A reward model. Args: as of `FrozenModel`."""

    max_length: int | None = None

    def __init__(
        self,
        model: ModelSection,
        training: TrainingSection,
        device: torch.device,
        world: World | None = None,
    ) -> None:
        def build() -> ScalarModel:
            written = nullcontext if world is None else whole
            return ScalarModel(load_scalar_model(model, seed=0, attention=training.attention, whole=written))

        super().__init__(build, training, device, world)

    def scores(self, sequences: Ragged) -> NDArray[np.float32]:
        """[B] of each row's last token."""
        return self.forward_all(sequences, last_positions(sequences)).values.astype(np.float32)


class LogprobModel(Protocol):
    """A language model, wherever it runs."""

    def forward_all(
        self,
        sequences: Ragged,
        is_source: NDArray[np.bool_],
        prompts: Ragged | None = None,
        *,
        temperature: float,
    ) -> Ragged:
        """As `FrozenModel.forward_all`: log-probs of the tokens that follow the selected positions."""
        ...

    def rest(self) -> None: ...

    def wake(self) -> None: ...


class Reference:
    """Log-probs under the policy that training started from."""

    def __init__(self, model: LogprobModel) -> None:
        self.model = model

    def logprobs(self, rollouts: Rollouts, temperature: float) -> Ragged:
        """At the sampler's temperature; one value a response token."""
        sequences, prompts = rollouts.sequences, rollouts.prompts
        is_source = before_responses(prompts.lengths, sequences)
        return self.model.forward_all(sequences, is_source, prompts, temperature=temperature)

    def answer(self, batch: Referenced) -> Referenced:
        """The batch with the log-probs of its answers, at temperature 1, filled in."""
        sequences = Ragged.concat(batch.sides)
        is_source = before_responses(np.tile(batch.prompt_lengths, 2), sequences)
        totals = row_totals(self.model.forward_all(sequences, is_source, temperature=1.0))
        return batch.with_reference(totals[: len(batch)], totals[len(batch) :])

    def rest(self) -> None:
        self.model.rest()

    def wake(self, weights_only: bool = False) -> None:
        self.model.wake()


class ReferenceWorker(Reference):
    """One that computes as the trainer does.

    Args:
        world: as in `FrozenModel`.
    """

    def __init__(
        self,
        model: ModelSection,
        training: TrainingSection,
        device: torch.device,
        threads: int,
        world: World | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        # In parts, every rank has to take equally many steps.
        budget = training.tokens_per_micro_batch if world else training.lockstep_tokens

        def build() -> PolicyModel:
            return PolicyModel(load_policy_model(model, attention=training.attention), budget)

        super().__init__(FrozenModel(build, training, device, world))
        self.world = world

    def close(self) -> None:
        if self.world is not None:
            leave_world()
