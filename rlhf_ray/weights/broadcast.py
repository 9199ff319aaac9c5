"""Weights from one sender to any number of receivers, one flat message a group of tensors: over TCP, or,
where all are on one machine, in memory that they share, with one byte over TCP when a message is there.

Knows nothing of models or of vLLM, so that every kind of receiver shares it. Every wait ends after `timeout`
seconds with a `WeightSyncError`: joining the group, sending, receiving. A side that fails closes its
connections, so that the others fail at once and do not wait for their own deadline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Protocol

import torch
from torch.distributed import BroadcastOptions, ProcessGroupGloo, TCPStore

from rlhf_ray.errors import WeightSyncError
from rlhf_ray.weights.shared_memory import accept, offer

SENDER_RANK = 0
AHEAD = 2
"""Messages under way at a time: while one is packed or loaded, the next is on the wire."""
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


class Transfer(Protocol):
    """A message under way."""

    def wait(self) -> object: ...


@dataclass
class Message:
    """Fields: memory: uint8, the message and perhaps more; not to be touched before it has arrived."""

    memory: torch.Tensor
    transfer: Transfer | None

    def wait(self) -> None:
        """Once. The transfer is let go, since it keeps the connections open for as long as anybody holds it,
        be it the traceback of its own failure."""
        transfer, self.transfer = self.transfer, None
        assert transfer is not None, "a message is waited for once"
        try:
            transfer.wait()
        finally:
            del transfer


class WeightGroup:
    """The connections between one sender and its receivers.

    Messages overlap with the work on both sides: the sender packs the next one while the last is on the wire,
    and a receiver has the next one coming while it loads. All members start them in the same order.
    """

    def __init__(
        self, address: str, port: int, rank: int, world_size: int, timeout: float, num_bytes: int = 0
    ) -> None:
        """Returns when all `world_size` members have joined. The sender listens on `port`.

        Args:
            num_bytes: of all messages between two calls of `flush`, by `message_bytes`; the sender says how
                many may be shared. 0 shares none.
        """
        deadline = timedelta(seconds=timeout)
        self._sent: deque[Message] = deque()
        self._used = 0
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
            self._shared = (
                offer(self._store, world_size - 1, num_bytes)
                if rank == SENDER_RANK
                else accept(self._store, rank)
            )
        except RuntimeError as error:
            raise WeightSyncError(
                f"{self._who}: not everyone joined within {timeout:g} s: {error}"
            ) from error

    def send(self, tensors: Sequence[torch.Tensor]) -> None:
        """Send one group of tensors, of any device, types and shapes.

        Returns when the message is on its way; the tensors may change then. `flush` waits for its arrival.
        """
        offsets, num_bytes = _layout([tensor.numel() * tensor.dtype.itemsize for tensor in tensors])
        memory = self._earlier_memory(num_bytes) if self._shared is None else self._next_shared(num_bytes)
        for tensor, offset in zip(tensors, offsets, strict=True):
            _view(memory, offset, tensor.dtype, tuple(tensor.shape)).copy_(tensor)
        self._sent.append(self._start(memory, num_bytes))

    def flush(self) -> None:
        """Wait until all that was sent has arrived."""
        while self._sent:
            self._finish(self._sent.popleft())
        self._used = 0

    def receive_all(self, plan: BroadcastPlan, load: Callable[[NamedTensors], None]) -> None:
        """Receive what is planned and hand it to `load` group by group, on the CPU, in memory that is not
        used again before all of the next plan's messages.

        Whatever `load` raises is raised here, after the connections are closed: the sender then fails at one
        of its next messages and does not go on to fill a receiver that has given up.
        """
        coming: deque[tuple[list[TensorSpec], Message]] = deque()
        try:
            for specs in plan.groups():
                coming.append((specs, self._expect(specs)))
                if len(coming) == AHEAD:
                    load(self._arrived(*coming.popleft()))
            while coming:
                load(self._arrived(*coming.popleft()))
            self._used = 0
        except BaseException:
            # The connections close only when nothing is under way any more.
            for _, message in coming:
                with suppress(RuntimeError):
                    message.wait()
            self.close()
            raise

    def close(self) -> None:
        self._sent.clear()
        self._group = self._shared = None

    def _next_shared(self, num_bytes: int) -> torch.Tensor:
        assert self._shared is not None
        start, self._used = self._used, self._used + num_bytes
        if self._used > len(self._shared):
            raise WeightSyncError(
                f"{self._who}: more is sent than the {len(self._shared)} bytes that were announced"
            )
        return self._shared[start : self._used]

    def _earlier_memory(self, num_bytes: int) -> torch.Tensor:
        """For a message, at least so long: that of an earlier one that has arrived, since fresh pages cost
        about as much as the copy into them."""
        if len(self._sent) == AHEAD:
            earlier = self._sent.popleft()
            self._finish(earlier)
            if len(earlier.memory) >= num_bytes:
                return earlier.memory
        return torch.empty(num_bytes, dtype=torch.uint8)

    def _expect(self, specs: Sequence[TensorSpec]) -> Message:
        _, num_bytes = _layout([spec.num_bytes for spec in specs])
        if self._shared is not None:
            return self._start(self._next_shared(num_bytes), num_bytes)
        return self._start(torch.empty(num_bytes, dtype=torch.uint8), num_bytes)

    def _arrived(self, specs: Sequence[TensorSpec], message: Message) -> NamedTensors:
        self._finish(message)
        offsets, _ = _layout([spec.num_bytes for spec in specs])
        pairs = zip(specs, offsets, strict=True)
        return [(spec.name, _view(message.memory, offset, spec.dtype, spec.shape)) for spec, offset in pairs]

    def _start(self, memory: torch.Tensor, num_bytes: int) -> Message:
        """The message in the first `num_bytes` of the memory on its way; one in shared memory is there."""
        if self._group is None:
            raise WeightSyncError(f"{self._who}: the connections are closed; connect anew")
        sent = memory[:num_bytes] if self._shared is None else torch.empty(1, dtype=torch.uint8)
        options = BroadcastOptions()
        options.rootRank = SENDER_RANK
        options.rootTensor = 0
        try:
            return Message(memory, self._group.broadcast([sent], options))  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise WeightSyncError(f"{self._who}: {error}") from error

    def _finish(self, message: Message) -> None:
        try:
            message.wait()
        except RuntimeError as error:
            raise WeightSyncError(f"{self._who}: {error}") from error


def message_bytes(groups: Iterable[Sequence[TensorSpec]]) -> int:
    """Of the messages for all these groups together."""
    return sum(_layout([spec.num_bytes for spec in specs])[1] for specs in groups)


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
