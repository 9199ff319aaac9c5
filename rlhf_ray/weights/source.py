"""The trainer's weights as a stream of full tensors under their checkpoint names, at any ZeRO stage."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from rlhf_ray.models.adapters import CheckpointWeight, checkpoint_weights
from rlhf_ray.weights.broadcast import TensorSpec


class WeightSource(Protocol):
    """What vLLM's weight senders ask of a source (`vllm.distributed.weight_transfer.base.WeightSource`).

    Every iteration is a fresh pass over the current weights, in the order of `metadata`. All trainer ranks
    have to iterate, and to the end, since making full tensors may be a collective.
    """

    def metadata(self) -> list[TensorSpec]:
        """What iteration will give, without gathering anything."""
        ...

    def groups(self) -> list[list[str]]:
        """The names of `metadata` in order, cut into the groups that `iter_groups` gives."""
        ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]: ...


def layer_groups(names: list[str]) -> list[list[str]]:
    """Neighbours that belong to the same layer, told by the path up to its number: embeddings, one group a
    layer,
    the rest. The outermost number counts, which keeps all experts of a layer together."""
    return [list(group) for _, group in itertools.groupby(names, key=_layer)]


def _layer(name: str) -> tuple[str, ...]:
    parts = name.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    return tuple(parts[: numbered[0] + 1]) if numbered else ()


class ModuleWeightSource:
    """The parameters of a Hugging Face module that DeepSpeed trains.

    Names are those of the checkpoint: a weight that several modules share appears once, under the name of the
    first, and the prefix of a wrapper is cut off. Adapters are merged on the way, into new tensors. At ZeRO 0
    to 2 every rank holds the full, updated parameters. At ZeRO 3 each holds a part, and one layer at a time
    is gathered and let go again, so never more than a layer is whole.
    """

    def __init__(self, module: nn.Module, wire_dtype: torch.dtype, zero_stage: int, prefix: str = "") -> None:
        """
        Args:
            module: the model itself, not the DeepSpeed engine around it.
            wire_dtype: the type of the receiving engines' weights.
            zero_stage: DeepSpeed's, 0 to 3.
            prefix: of the parameters to send, where `module` holds the model inside; parameters without it
                stay.
        """
        self._weights = {
            name.removeprefix(prefix): weight
            for name, weight in checkpoint_weights(module).items()
            if name.startswith(prefix)
        }
        self._wire_dtype = wire_dtype
        self._is_partitioned = zero_stage == 3

    def leave_out_frozen(self) -> None:
        """For receivers that have had all weights once: from now on only layers in which something is trained
        (as with adapters). These go whole, since an engine may keep several of a layer's matrices as one."""
        moving = [
            name
            for names in self.groups()
            if any(self._weights[name].is_trained for name in names)
            for name in names
        ]
        self._weights = {name: self._weights[name] for name in moving}

    def metadata(self) -> list[TensorSpec]:
        return [
            TensorSpec(name, self._wire_dtype, self._full_shape(weight.parameter))
            for name, weight in self._weights.items()
        ]

    def groups(self) -> list[list[str]]:
        return layer_groups(list(self._weights))

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for names, tensors in self.iter_groups():
            yield from zip(names, tensors, strict=True)

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        for names in self.groups():
            yield names, self._group([self._weights[name] for name in names])

    @torch.no_grad()
    def _group(self, weights: list[CheckpointWeight]) -> list[torch.Tensor]:
        """The full tensors; at ZeRO 3 copies, since the parameters' own memory is given back on leaving."""
        with self._gathered([parameter for weight in weights for parameter in weight.parameters]):
            return [
                weight.merged().to(self._wire_dtype, copy=self._is_partitioned and weight.layer is None)
                for weight in weights
            ]

    def _gathered(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
        if not self._is_partitioned:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=None)

    def _full_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.ds_shape if self._is_partitioned else parameter.shape)  # type: ignore[attr-defined]
