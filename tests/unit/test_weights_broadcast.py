"""The transport: bytes arrive as they were sent, and every wait ends."""

from __future__ import annotations

import time

import pytest
import torch

from rlhf_ray.errors import WeightSyncError
from rlhf_ray.weights.broadcast import BroadcastPlan, NamedTensors, TensorSpec, WeightGroup
from rlhf_ray.weights.gloo import announcement, in_background
from tests.engine_process import free_port


def connect(num_receivers: int, timeout: float = 20.0) -> list[WeightGroup]:
    """Sender and receivers, all in this process."""
    port, size = free_port(), num_receivers + 1
    joining = [in_background(WeightGroup, "127.0.0.1", port, rank, size, timeout) for rank in range(size)]
    return [future.result(timeout) for future in joining]


def tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(3, 5).bfloat16(),
        torch.randn(7),
        torch.randn(4, 6).t(),
        torch.tensor(2.5),
        torch.arange(3, dtype=torch.int64),
    ]


def test_tensors_of_any_type_and_layout_arrive_bit_for_bit_at_every_receiver() -> None:
    sender, *receivers = connect(num_receivers=2)
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


def test_a_contradictory_plan_is_refused() -> None:
    with pytest.raises(WeightSyncError, match="2 names, 2 types, 2 shapes, groups of 3"):
        BroadcastPlan(["a", "b"], ["float32", "float32"], [[1], [1]], [1, 2])


def test_a_receiver_that_fails_to_load_ends_the_sender_at_its_next_message() -> None:
    sender, receiver = connect(num_receivers=1)
    plan = announcement([[TensorSpec("a", torch.float32, (2,))]])

    def refuse(pairs: NamedTensors) -> None:
        raise ValueError("this model has no a")

    receiving = in_background(receiver.receive_all, plan, refuse)
    sender.send([torch.ones(2)])
    with pytest.raises(ValueError, match="no a"):
        receiving.result(20.0)
    start = time.monotonic()
    with pytest.raises(WeightSyncError, match="rank 0 of 2"):
        sender.send([torch.ones(2_000_000)])
    assert time.monotonic() - start < 5.0


def test_a_sender_that_goes_silent_ends_the_receiver_after_the_deadline() -> None:
    _sender, receiver = connect(num_receivers=1, timeout=1.0)
    start = time.monotonic()
    with pytest.raises(WeightSyncError, match="rank 1 of 2"):
        receiver.receive([TensorSpec("a", torch.float32, (2,))])
    assert 0.5 < time.monotonic() - start < 5.0
    receiver.close()
    with pytest.raises(WeightSyncError, match="connect anew"):
        receiver.receive([TensorSpec("a", torch.float32, (2,))])


def test_joining_alone_ends_after_the_deadline() -> None:
    start = time.monotonic()
    with pytest.raises(WeightSyncError, match="not everyone joined within 1 s"):
        WeightGroup("127.0.0.1", free_port(), rank=0, world_size=2, timeout=1.0)
    assert time.monotonic() - start < 5.0
