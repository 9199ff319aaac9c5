"""The transport: bytes arrive as they were sent, and every wait ends."""

from __future__ import annotations

import errno
import functools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from rlhf_ray.errors import WeightSyncError
from rlhf_ray.weights import shared_memory
from rlhf_ray.weights.broadcast import (
    BroadcastPlan,
    NamedTensors,
    TensorSpec,
    WeightGroup,
    message_bytes,
)
from rlhf_ray.weights.gloo import announcement, in_background
from tests.engine_process import free_port

SHARED_BYTES = 40_000_000
either_way = pytest.mark.parametrize("num_bytes", [0, SHARED_BYTES], ids=["tcp", "shared memory"])


def connect(num_receivers: int, timeout: float = 20.0, num_bytes: int = 0) -> list[WeightGroup]:
    """Sender and receivers, all in this process. num_bytes: of the memory that they share."""
    port, size = free_port(), num_receivers + 1
    joining = [
        in_background(WeightGroup, "127.0.0.1", port, rank, size, timeout, num_bytes if rank == 0 else 0)
        for rank in range(size)
    ]
    return [future.result(timeout) for future in joining]


def shared_files() -> list[Path]:
    return list(shared_memory.FOLDER.glob("rlhf_ray-*"))


def tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(3, 5).bfloat16(),
        torch.randn(7),
        torch.randn(4, 6).t(),
        torch.tensor(2.5),
        torch.arange(3, dtype=torch.int64),
    ]


@either_way
def test_tensors_of_any_type_and_layout_arrive_bit_for_bit_at_every_receiver(num_bytes: int) -> None:
    sender, *receivers = connect(num_receivers=2, num_bytes=num_bytes)
    sent = tensors()
    specs = [TensorSpec(f"t{i}", tensor.dtype, tuple(tensor.shape)) for i, tensor in enumerate(sent)]
    plan = announcement([specs[:3], specs[3:]])
    arrived: list[NamedTensors] = [[], []]
    receiving = [
        in_background(receiver.receive_all, plan, pairs.extend)
        for receiver, pairs in zip(receivers, arrived, strict=True)
    ]
    sender.send(sent[:3])
    sender.send(sent[3:])
    for future in receiving:
        future.result(20.0)
    for pairs in arrived:
        assert [name for name, _ in pairs] == ["t0", "t1", "t2", "t3", "t4"]
        for (_, got), want in zip(pairs, sent, strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)


@either_way
def test_messages_of_any_length_follow_each_other_while_the_receivers_load(num_bytes: int) -> None:
    """The sender's memory is used again, by longer and by shorter messages, and what was received stays."""
    sender, *receivers = connect(num_receivers=2, num_bytes=num_bytes)
    sent = [torch.full((size,), float(number)) for number, size in enumerate([9, 70_000, 3, 1, 200_000, 5])]
    specs = [TensorSpec(f"t{number}", torch.float32, tuple(t.shape)) for number, t in enumerate(sent)]
    plan = announcement([[spec] for spec in specs])
    arrived: list[NamedTensors] = [[], []]

    def load(pairs: NamedTensors, into: NamedTensors) -> None:
        time.sleep(0.02)
        into.extend(pairs)

    receiving = [
        in_background(receiver.receive_all, plan, functools.partial(load, into=into))
        for receiver, into in zip(receivers, arrived, strict=True)
    ]
    for tensor in sent:
        changing = tensor.clone()
        sender.send([changing])
        changing.zero_()  # it was copied into the message
    sender.flush()
    for future in receiving:
        future.result(20.0)
    for pairs in arrived:
        assert [name for name, _ in pairs] == [spec.name for spec in specs]
        assert all(torch.equal(got, want) for (_, got), want in zip(pairs, sent, strict=True))


@either_way
def test_the_next_message_travels_while_one_is_loaded(num_bytes: int) -> None:
    sender, receiver = connect(num_receivers=1, num_bytes=num_bytes)
    spec = TensorSpec("t", torch.float32, (4_000_000,))  # more than the system's buffers hold
    loading, go_on = threading.Event(), threading.Event()

    def load(pairs: NamedTensors) -> None:
        loading.set()
        assert go_on.wait(20.0)

    receiving = in_background(receiver.receive_all, announcement([[spec], [spec]]), load)
    for _ in range(2):
        sender.send([torch.ones(spec.shape)])
    sender.flush()
    assert loading.wait(20.0) and not receiving.done()  # both have arrived, and the first is not loaded yet
    go_on.set()
    receiving.result(20.0)


def test_shared_memory_is_used_again_by_the_next_update_and_leaves_no_file() -> None:
    spec = TensorSpec("t", torch.float32, (1000,))
    plan = announcement([[spec], [spec]])
    sender, receiver = connect(num_receivers=1, num_bytes=message_bytes(plan.groups()))
    assert not shared_files()
    for update in range(3):
        arrived: NamedTensors = []
        receiving = in_background(receiver.receive_all, plan, arrived.extend)
        for value in (update, -update):
            sender.send([torch.full(spec.shape, float(value))])
        sender.flush()
        receiving.result(20.0)
        assert [tensor[0].item() for _, tensor in arrived] == [update, -update]
    with pytest.raises(WeightSyncError, match="8000 bytes that were announced"):
        sender.send([torch.ones(2001)])


class Elsewhere:
    """A receiver's store on another machine, where the sender's file is not."""

    def __init__(self, store: HashStore) -> None:
        self._store = store

    def get(self, key: str) -> bytes:
        return b"not-here" if key == shared_memory.NAME else self._store.get(key)

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_memory_is_shared_by_all_or_by_nobody(is_elsewhere: bool) -> None:
    store = HashStore()
    offered = in_background(shared_memory.offer, store, 2, 4096)
    here = in_background(shared_memory.accept, store, 1)
    there = in_background(shared_memory.accept, Elsewhere(store) if is_elsewhere else store, 2)
    ends = [future.result(20.0) for future in (offered, here, there)]
    assert not shared_files()
    if is_elsewhere:
        assert ends == [None, None, None]
    else:
        ends[0][4095] = 7
        assert [len(end) for end in ends] == [4096] * 3 and ends[1][4095] == ends[2][4095] == 7


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def half_taken(_: object) -> SimpleNamespace:
    return SimpleNamespace(f_frsize=4096, f_blocks=10, f_bavail=5)


@pytest.mark.parametrize(("call", "answer"), [("posix_fallocate", full), ("statvfs", half_taken)])
def test_without_room_for_it_nothing_is_shared(
    monkeypatch: pytest.MonkeyPatch, call: str, answer: Callable[[object], object]
) -> None:
    monkeypatch.setattr(os, call, answer)
    store = HashStore()
    offered = in_background(shared_memory.offer, store, 1, 4096)
    assert shared_memory.accept(store, 1) is None and offered.result(20.0) is None
    assert not shared_files()


def test_a_contradictory_plan_is_refused() -> None:
    with pytest.raises(WeightSyncError, match="2 names, 2 types, 2 shapes, groups of 3"):
        BroadcastPlan(["a", "b"], ["float32", "float32"], [[1], [1]], [1, 2])


@pytest.mark.parametrize("num_coming", [0, 1, 3])
def test_a_receiver_that_fails_to_load_ends_the_sender_at_one_of_its_next_messages(num_coming: int) -> None:
    sender, receiver = connect(num_receivers=1)
    plan = announcement([[TensorSpec("a", torch.float32, (2,))]] * (1 + num_coming))

    def refuse(pairs: NamedTensors) -> None:
        raise ValueError("this model has no a")

    receiving = in_background(receiver.receive_all, plan, refuse)
    for _ in range(1 + min(num_coming, 1)):  # what is on its way when the first is loaded
        sender.send([torch.ones(2)])
    with pytest.raises(ValueError, match="no a"):
        receiving.result(20.0)
    start = time.monotonic()
    with pytest.raises(WeightSyncError, match="rank 0 of 2"):
        sender.send([torch.ones(2_000_000)])
        sender.flush()
    assert time.monotonic() - start < 5.0


def test_a_sender_that_goes_silent_ends_the_receiver_after_the_deadline() -> None:
    _sender, receiver = connect(num_receivers=1, timeout=1.0)
    start = time.monotonic()
    plan = announcement([[TensorSpec("a", torch.float32, (2,))]] * 3)
    with pytest.raises(WeightSyncError, match="rank 1 of 2"):
        receiver.receive_all(plan, lambda pairs: None)
    assert 0.5 < time.monotonic() - start < 5.0
    with pytest.raises(WeightSyncError, match="connect anew"):
        receiver.receive_all(plan, lambda pairs: None)


def test_joining_alone_ends_after_the_deadline() -> None:
    start = time.monotonic()
    with pytest.raises(WeightSyncError, match="not everyone joined within 1 s"):
        WeightGroup("127.0.0.1", free_port(), rank=0, world_size=2, timeout=1.0)
    assert time.monotonic() - start < 5.0
