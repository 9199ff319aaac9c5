"""The sending end of the backend `gloo`, the twin of vLLM's NCCL backend for machines without a GPU.

It speaks vLLM's weight transfer protocol (`vllm.distributed.weight_transfer`: the four control calls, their
order, the factory's `trainer_init`), so trainer and engines are driven in one way on every device. It does
not import vLLM: a trainer needs none, and engines of other kinds receive in the same way. The sender (trainer
rank 0) broadcasts one flat message a layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, ParamSpec, Protocol, Self, TypeVar

import torch

from rlhf_ray.errors import WeightSyncError
from rlhf_ray.weights.broadcast import (
    SENDER_RANK,
    BroadcastPlan,
    Endpoint,
    TensorSpec,
    WeightGroup,
    message_bytes,
)
from rlhf_ray.weights.plugin import BACKEND
from rlhf_ray.weights.source import WeightSource

P = ParamSpec("P")
T = TypeVar("T")


class TransferClient(Protocol):
    """The engines' control plane as vLLM's senders see it; calls return when every engine has answered."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


@dataclass(frozen=True)
class GlooTrainerInitInfo:
    """
    Fields:
        rank: of this process in the trainer; rank 0 sends.
        world_size: the sender and all workers of all engines.
        timeout: seconds, for every single wait.
    """

    backend: ClassVar[str] = BACKEND

    master_address: str
    master_port: int
    world_size: int
    timeout: float
    rank: int


class GlooTrainerWeightTransferEngine:
    """The sending end. All trainer ranks hold one and call `send_weights` together; rank 0 sends.

    The other ranks only walk through the source, which gathers sharded parameters with collectives.
    """

    def __init__(
        self, *, client: TransferClient, source: WeightSource, is_sender: bool, timeout: float
    ) -> None:
        self.client = client
        self.source = source
        self.is_sender = is_sender
        self._timeout = timeout
        self._group: WeightGroup | None = None

    @classmethod
    def trainer_init(
        cls,
        init_info: GlooTrainerInitInfo,
        *,
        client: TransferClient,
        source: WeightSource,
    ) -> Self:
        is_sender = init_info.rank == 0
        engine = cls(client=client, source=source, is_sender=is_sender, timeout=init_info.timeout)
        if engine.is_sender:
            engine._join(init_info)
        return engine

    def _join(self, init_info: GlooTrainerInitInfo) -> None:
        """Both sides wait for each other, so neither may be waited for first."""
        address, port, world_size = init_info.master_address, init_info.master_port, init_info.world_size
        endpoint = Endpoint(address, port, SENDER_RANK + 1, world_size, self._timeout)
        receivers = in_background(self.client.init_weight_transfer_engine, asdict(endpoint))
        num_bytes = message_bytes(self._groups())
        sender = in_background(WeightGroup, address, port, SENDER_RANK, world_size, self._timeout, num_bytes)
        both: list[Future[Any]] = [receivers, sender]
        finished, unfinished = wait(both, timeout=2 * self._timeout, return_when=FIRST_EXCEPTION)
        for call in both:
            if call in finished:
                call.result()
        if unfinished:
            raise WeightSyncError(f"the engines did not join the transfer within {2 * self._timeout:g} s")
        self._group = sender.result()

    def send_weights(self) -> None:
        """Raises: WeightSyncError if a receiver fails or is late; the group is unusable then."""
        if not self.is_sender:
            self._walk()
            return
        groups = self._groups()
        try:
            self.client.start_weight_update()
        except Exception:
            # The other trainer ranks are in the source's collectives already, and would wait for this one.
            self._walk()
            raise
        receiving = in_background(self.client.update_weights, asdict(announcement(groups)))
        try:
            failure = self._broadcast(groups, receiving)
        except BaseException:
            self.shutdown()
            raise
        if failure is not None:
            self.shutdown()
            raise self._explained(failure, receiving)
        try:
            receiving.result(self._timeout)
        except TimeoutError as error:
            raise WeightSyncError(f"the engines did not load what was sent in {self._timeout:g} s") from error
        self.client.finish_weight_update()

    def _groups(self) -> list[list[TensorSpec]]:
        specs = {spec.name: spec for spec in self.source.metadata()}
        return [[specs[name] for name in names] for names in self.source.groups()]

    def _walk(self) -> None:
        for _ in self.source.iter_groups():
            pass

    def _broadcast(
        self, groups: Sequence[Sequence[TensorSpec]], receiving: Future[None]
    ) -> WeightSyncError | None:
        """Send all groups; returns what went wrong.

        After a failure the rest of the source is still walked through, for the other ranks' sake.
        """
        assert self._group is not None, "only the sender sends, after it has joined"
        failure = None
        for specs, (names, tensors) in zip(groups, self.source.iter_groups(), strict=True):
            if failure is None and receiving.done() and receiving.exception() is not None:
                failure = WeightSyncError("the engines gave up before all weights were sent")
            if failure is not None:
                continue
            try:
                _check(specs, names, tensors)
                self._group.send(tensors)
            except WeightSyncError as error:
                failure = error
        if failure is None:
            try:
                self._group.flush()
            except WeightSyncError as error:
                failure = error
        return failure

    def _explained(self, failure: WeightSyncError, receiving: Future[None]) -> WeightSyncError:
        """The sender's failure with what the receivers say; theirs is usually the cause."""
        wait([receiving], timeout=self._timeout)
        if not receiving.done():
            theirs = f"they did not answer within {self._timeout:g} s"
        else:
            theirs = str(receiving.exception() or "they report no error")
        return WeightSyncError(f"sending weights failed: {failure}; the engines' side: {theirs}")

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()


def announcement(groups: Sequence[Sequence[TensorSpec]]) -> BroadcastPlan:
    specs = [spec for group in groups for spec in group]
    return BroadcastPlan(
        names=[spec.name for spec in specs],
        dtype_names=[str(spec.dtype).removeprefix("torch.") for spec in specs],
        shapes=[list(spec.shape) for spec in specs],
        group_sizes=[len(group) for group in groups],
    )


def _check(specs: Sequence[TensorSpec], names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
    """The receivers cut the flat message by what was announced, so what is sent must be exactly that."""
    for spec, name, tensor in zip(specs, names, tensors, strict=True):
        if not spec.describes(name, tensor):
            sent = TensorSpec(name, tensor.dtype, tuple(tensor.shape))
            raise WeightSyncError(f"the weight source announced {spec} and then gave {sent}")


def in_background(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Run on a daemon thread, which, unlike an executor's, does not hold up the interpreter's exit."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=f"weights-{function.__name__}", daemon=True).start()
    return future
