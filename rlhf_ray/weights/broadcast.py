"""Weights over TCP: one sender, any number of receivers, one flat message a group of tensors.

Knows nothing of models or of vLLM, so that every kind of receiver shares it. Every wait ends after `timeout`
seconds with a `WeightSyncError`: joining the group, sending, receiving. A side that fails closes its
connections, so that the others fail at once and do not wait for their own deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import prod

import torch
from torch.distributed import BroadcastOptions, ProcessGroupGloo, TCPStore

from rlhf_ray.errors import WeightSyncError

SENDER_RANK = 0
_ALIGNMENT = 16
"""Bytes. A view of a byte buffer as a wider type must start at a multiple of that type's size."""

NamedTensors = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape of one tensor on the wire."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def describes(self, name: str, tensor: torch.Tensor) -> bool:
        return (name, tensor.dtype, tuple(tensor.shape)) == (self.name, self.dtype, self.shape)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


@dataclass
class Endpoint:
    """Where a receiver joins, as plain values that any transport can carry.

    Fields:
        rank_offset: rank of this engine's first worker; the sender is rank 0.
        world_size: the sender and all workers of all engines.
        timeout: seconds.
    """

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout: float


@dataclass
class BroadcastPlan:
    """What is about to be sent, as plain values: all tensors in order, and how many share a message."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    group_sizes: list[int]

    def __post_init__(self) -> None:
        lengths = {len(self.names), len(self.dtype_names), len(self.shapes), sum(self.group_sizes)}
        if len(lengths) != 1:
            raise WeightSyncError(
                f"the announced weights contradict themselves: {len(self.names)} names, "
                f"{len(self.dtype_names)} types, {len(self.shapes)} shapes, groups of "
                f"{sum(self.group_sizes)} tensors in all"
            )

    def groups(self) -> Iterator[list[TensorSpec]]:
        columns = zip(self.names, self.dtype_names, self.shapes, strict=True)
        specs = [TensorSpec(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in columns]
        start = 0
        for size in self.group_sizes:
            yield specs[start : start + size]
            start += size


class WeightGroup:
    """The connections between one sender and its receivers."""

    def __init__(self, address: str, port: int, rank: int, world_size: int, timeout: float) -> None:
        """Returns when all `world_size` members have joined. The sender listens on `port`."""
        deadline = timedelta(seconds=timeout)
        self._who = f"rank {rank} of {world_size} of the weight transfer at {address}:{port}"
        try:
            self._store = TCPStore(
                address,
                port,
                world_size,
                is_master=rank == SENDER_RANK,
                timeout=deadline,
                wait_for_workers=False,
            )
            self._group: ProcessGroupGloo | None = ProcessGroupGloo(self._store, rank, world_size, deadline)
        except RuntimeError as error:
            raise WeightSyncError(
                f"{self._who}: not everyone joined within {timeout:g} s: {error}"
            ) from error

    def send(self, tensors: Sequence[torch.Tensor]) -> None:
        """Send one group of tensors, of any device, types and shapes."""
        offsets, num_bytes = _layout([tensor.numel() * tensor.dtype.itemsize for tensor in tensors])
        flat = torch.empty(num_bytes, dtype=torch.uint8)
        for tensor, offset in zip(tensors, offsets, strict=True):
            _view(flat, offset, tensor.dtype, tuple(tensor.shape)).copy_(tensor)
        self._broadcast(flat)

    def receive(self, specs: Sequence[TensorSpec]) -> NamedTensors:
        """One group of tensors, on the CPU, in memory that is not used again for the next group."""
        offsets, num_bytes = _layout([spec.num_bytes for spec in specs])
        flat = torch.empty(num_bytes, dtype=torch.uint8)
        self._broadcast(flat)
        pairs = zip(specs, offsets, strict=True)
        return [(spec.name, _view(flat, offset, spec.dtype, spec.shape)) for spec, offset in pairs]

    def receive_all(self, plan: BroadcastPlan, load: Callable[[NamedTensors], None]) -> None:
        """Receive what is planned and hand it to `load` group by group.

        Whatever `load` raises is raised here, after the connections are closed: the sender then fails at its
        next message and does not go on to fill a receiver that has given up.
        """
        try:
            for specs in plan.groups():
                load(self.receive(specs))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._group = None

    def _broadcast(self, flat: torch.Tensor) -> None:
        if self._group is None:
            raise WeightSyncError(f"{self._who}: the connections are closed; connect anew")
        options = BroadcastOptions()
        options.rootRank = SENDER_RANK
        options.rootTensor = 0
        try:
            self._group.broadcast([flat], options).wait()  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise WeightSyncError(f"{self._who}: {error}") from error


def _layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Byte offset of each tensor in the flat message, and the length of the message."""
    offsets = []
    end = 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def _view(flat: torch.Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return flat[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)
