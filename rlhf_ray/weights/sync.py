"""Publishing: the trainer's current weights to all generation engines, stamped with their version."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch

from rlhf_ray.errors import ResourceError, RlhfRayError, WeightSyncError
from rlhf_ray.roles import Pending
from rlhf_ray.types import Metrics
from rlhf_ray.weights.broadcast import TensorSpec
from rlhf_ray.weights.gloo import GlooTrainerInitInfo, GlooTrainerWeightTransferEngine, TransferClient
from rlhf_ray.weights.source import WeightSource

Backend = Literal["gloo", "nccl", "ipc"]
Payload = dict[str, Any]
T = TypeVar("T")


class EngineCalls(Protocol):
    """The control plane of one engine. Calls start at once and return a handle."""

    def init_weight_transfer_engine(self, init_info: Payload) -> Pending[None]: ...

    def start_weight_update(self) -> Pending[None]: ...

    def update_weights(self, update_info: Payload) -> Pending[None]: ...

    def finish_weight_update(self, weight_version: str) -> Pending[None]: ...


class WeightSyncClient(Protocol):
    """The control plane of all engines together; calls return when every engine has answered."""

    def init_weight_transfer_engine(self, init_info: Payload) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Payload) -> None: ...

    def finish_weight_update(self, weight_version: str) -> None: ...


class MultiEngineClient:
    """Several engines as one: every call starts on all of them before any is waited for.

    The engines are members of one transfer group. Engine i has `tensor_parallel_size` workers in it, whose
    ranks follow those of engine i - 1; the trainer's sender is rank 0.
    """

    def __init__(self, engines: Sequence[EngineCalls], tensor_parallel_size: int) -> None:
        self._engines = tuple(engines)
        self._tensor_parallel_size = tensor_parallel_size

    @property
    def num_receivers(self) -> int:
        return len(self._engines) * self._tensor_parallel_size

    def init_weight_transfer_engine(self, init_info: Payload) -> None:
        started = []
        for index, engine in enumerate(self._engines):
            own = dict(init_info)
            # The CUDA IPC backend has no ranks: engines find their own device's handle.
            if "rank_offset" in own:
                own["rank_offset"] = 1 + index * self._tensor_parallel_size
            started.append(engine.init_weight_transfer_engine(own))
        _wait("init_weight_transfer_engine", started)

    def start_weight_update(self) -> None:
        _wait("start_weight_update", [engine.start_weight_update() for engine in self._engines])

    def update_weights(self, update_info: Payload) -> None:
        _wait("update_weights", [engine.update_weights(update_info) for engine in self._engines])

    def finish_weight_update(self, weight_version: str) -> None:
        _wait(
            "finish_weight_update", [engine.finish_weight_update(weight_version) for engine in self._engines]
        )


def _wait(call: str, started: Sequence[Pending[None]]) -> None:
    """Wait for all, and only then raise: one engine's failure makes the others fail too, and the first error
    that is
    seen need not be the one that explains the rest."""
    failures = []
    for index, pending in enumerate(started):
        try:
            pending.result()
        except Exception as error:
            failures.append(f"engine {index}: {type(error).__name__}: {error}")
    if failures:
        raise WeightSyncError(f"{call}: " + "; ".join(failures))


@dataclass(frozen=True)
class TransferSpec:
    """How the weights travel.

    Fields:
        num_receivers: workers of all engines together.
        master_address, master_port: where the sender listens; `ipc` does not use them.
        timeout: seconds, for each single wait of `gloo`.
    """

    backend: Backend
    num_receivers: int
    master_address: str
    master_port: int
    timeout: float


def choose_backend(trainer_gpus: Collection[str], engine_gpus: Collection[str]) -> Backend:
    """The backend for a placement.

    Args:
        trainer_gpus, engine_gpus: the devices of all ranks and of all engines, by any name that is unique in
            the cluster; empty on CPU.

    Raises:
        ResourceError: the engines share only some of their devices with the trainer.
    """
    if not trainer_gpus or not engine_gpus:
        return "gloo"
    shared = set(trainer_gpus) & set(engine_gpus)
    if not shared:
        return "nccl"
    if shared == set(engine_gpus):
        return "ipc"
    raise ResourceError(
        f"placement.engine: the engines share {', '.join(sorted(shared))} with the policy and have other "
        "GPUs beside; give them only GPUs of the policy, or none of them"
    )


class WeightPublisher:
    """Sends the weights of a `WeightSource`. Every trainer rank holds one and calls `publish` together."""

    def __init__(
        self, source: WeightSource, spec: TransferSpec, rank: int, client: WeightSyncClient | None
    ) -> None:
        """Connects to the engines; returns when all have joined.

        Args:
            rank: of this process in the trainer. Rank 0 sends.
            client: of rank 0; the other ranks need none.
        """
        assert (client is not None) == (rank == 0), "rank 0, and only rank 0, talks to the engines"
        self._source = _TimedSource(source)
        self._client = _TimedClient(client)
        try:
            self._engine = _connect(spec, rank, self._client, self._source)
        except RlhfRayError:
            raise
        except Exception as error:
            raise WeightSyncError(f"connecting to the engines over {spec.backend}: {error}") from error

    def publish(self, version: int) -> Metrics:
        """Send the current weights; on return every engine samples with them and stamps tokens with
        `version`.

        Returns:
            Seconds: `time/sync_gather` (making full tensors from the trainer's), `time/sync_transfer`
            (sending and loading group by group) and `time/sync_load` (the engines' work before the first and
            after the last group); ranks other than 0 wait for none of the engines' work.

        Raises:
            WeightSyncError: a receiver failed or did not answer. No engine may be used then before a new
                publisher has published.
        """
        self._source.seconds = 0.0
        self._client.seconds = 0.0
        self._client.version = str(version)
        start = time.perf_counter()
        try:
            self._engine.send_weights()
        except RlhfRayError:
            raise
        except Exception as error:
            raise WeightSyncError(f"publishing version {version}: {type(error).__name__}: {error}") from error
        total = time.perf_counter() - start
        gather, load = self._source.seconds, self._client.seconds
        return {
            "time/sync_gather": gather,
            "time/sync_transfer": total - gather - load,
            "time/sync_load": load,
        }

    def close(self) -> None:
        """Leave the transfer group."""
        self._engine.shutdown()


class TransferSender(Protocol):
    """The trainer's end of a transfer: vLLM's `TrainerWeightTransferEngine`, or ours."""

    def send_weights(self) -> None: ...

    def shutdown(self) -> None: ...


def _connect(spec: TransferSpec, rank: int, client: TransferClient, source: WeightSource) -> TransferSender:
    """vLLM's own senders on GPUs, by its factory; on CPU ours, for which vLLM need not be installed."""
    address, port, world_size = spec.master_address, spec.master_port, 1 + spec.num_receivers
    if spec.backend == "gloo":
        return GlooTrainerWeightTransferEngine.trainer_init(
            GlooTrainerInitInfo(address, port, world_size, spec.timeout, rank), client=client, source=source
        )
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.base import TrainerInitInfo
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES

    init_info: TrainerInitInfo
    if spec.backend == "nccl":
        init_info = NCCLTrainerInitInfo(address, port, world_size, rank=rank)
    else:
        # Packed: one staging buffer, into which the largest tensor must fit, instead of a second copy of the
        # model.
        largest = max(tensor.num_bytes for tensor in source.metadata())
        buffer_size = max(largest, DEFAULT_PACKED_BUFFER_SIZE_BYTES)
        init_info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=buffer_size, rank=rank)
    # Client and source are what vLLM's base classes ask for, without being derived from them.
    return WeightTransferTrainerFactory.trainer_init(
        init_info,
        client=client,  # type: ignore[arg-type]
        source=source,  # type: ignore[arg-type]
    )


class _TimedSource:
    """Counts the seconds that the source inside takes to make tensors."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.seconds = 0.0

    def metadata(self) -> list[TensorSpec]:
        return self._source.metadata()

    def groups(self) -> list[list[str]]:
        return self._source.groups()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._timed(iter(self._source))

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        return self._timed(self._source.iter_groups())

    def _timed(self, items: Iterator[T]) -> Iterator[T]:
        while True:
            start = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield item


class _TimedClient:
    """Adds the version, which vLLM's senders leave out, and counts the seconds of the calls that they wait
    for.

    `init_weight_transfer_engine` and `update_weights` run beside the sender's own work and are not counted.
    """

    def __init__(self, client: WeightSyncClient | None) -> None:
        self._inner = client
        self.version = ""
        self.seconds = 0.0

    @property
    def _client(self) -> WeightSyncClient:
        assert self._inner is not None, "only the sender talks to the engines"
        return self._inner

    def init_weight_transfer_engine(self, init_info: Payload) -> None:
        self._client.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        start = time.perf_counter()
        self._client.start_weight_update()
        self.seconds += time.perf_counter() - start

    def update_weights(self, update_info: Payload) -> None:
        self._client.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        start = time.perf_counter()
        self._client.finish_weight_update(self.version)
        self.seconds += time.perf_counter() - start
