"""Publishing to engines that are really there: other processes with transformers models, over gloo."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_ray.config.schema import EngineSection
from rlhf_ray.engines.hf_generator import HFGenerator
from rlhf_ray.errors import ResourceError, WeightSyncError
from rlhf_ray.roles import Done, Pending
from rlhf_ray.types import Ragged
from rlhf_ray.weights.source import ModuleWeightSource
from rlhf_ray.weights.sync import MultiEngineClient, Payload, TransferSpec, WeightPublisher, choose_backend
from tests.engine_process import EngineProcess, free_port
from tests.tiny import tiny_model_folder

PROBE = Ragged.from_rows([np.arange(3, 40), np.arange(60, 90)], np.int32)
SECTION = EngineSection(backend="transformers", dtype="float32")


def start_engine(folder: Path) -> EngineProcess:
    return EngineProcess(HFGenerator, str(folder), SECTION, 128, threads=1)


def connect(
    source: ModuleWeightSource, engines: list[EngineProcess], timeout: float = 30.0
) -> WeightPublisher:
    spec = TransferSpec("gloo", len(engines), "127.0.0.1", free_port(), timeout)
    return WeightPublisher(source, spec, rank=0, client=MultiEngineClient(engines, tensor_parallel_size=1))


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def perturb(model: PreTrainedModel, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += scale * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def trainer_logprobs(model: PreTrainedModel, rows: Ragged) -> np.ndarray:
    values = []
    for row in rows:
        ids = torch.tensor(row.tolist())
        logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        values.append(logprobs[torch.arange(len(ids) - 1), ids[1:]])
    return torch.cat(values).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(folder: Path) -> Iterator[EngineProcess]:
    process = start_engine(folder).wait_until_built()
    yield process
    process.stop()


def test_two_engines_get_every_publication(folder: Path) -> None:
    engines = [start_engine(folder) for _ in range(2)]
    for process in engines:
        process.wait_until_built()
    model = load(folder)
    publisher = connect(ModuleWeightSource(model, torch.float32, zero_stage=0), engines)
    seen = []
    for version in range(3):
        if version:
            perturb(model, 0.05, seed=version)
        timings = publisher.publish(version)
        assert set(timings) == {"time/sync_gather", "time/sync_transfer", "time/sync_load"}
        assert all(seconds >= 0 for seconds in timings.values())
        seen.append(trainer_logprobs(model, PROBE))
        for process in engines:
            np.testing.assert_allclose(
                process.call("token_logprobs", PROBE).result().values, seen[-1], atol=1e-5
            )
    assert np.abs(seen[1] - seen[0]).mean() > 0.05 and np.abs(seen[2] - seen[1]).mean() > 0.05
    publisher.close()
    for process in engines:
        process.stop()


class KillingSource(ModuleWeightSource):
    """Sends a signal to the receiver after the first group."""

    process: EngineProcess
    signal: int

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        for index, group in enumerate(super().iter_groups()):
            if index == 1:
                self.process.process.kill() if self.signal == signal.SIGKILL else stop(self.process)
                time.sleep(0.2)
            yield group


def stop(process: EngineProcess) -> None:
    import os

    assert process.process.pid is not None
    os.kill(process.process.pid, signal.SIGSTOP)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "freezes"])
def test_a_receiver_that_is_lost_mid_transfer_fails_the_sender_in_time(
    folder: Path, engine: EngineProcess, how: signal.Signals
) -> None:
    source = KillingSource(load(folder), torch.float32, zero_stage=0)
    source.process, source.signal = engine, how
    publisher = connect(source, [engine], timeout=2.0)
    start = time.monotonic()
    with pytest.raises(WeightSyncError, match="engines"):
        publisher.publish(0)
    assert time.monotonic() - start < 8.0


def test_an_engine_that_is_gone_before_the_transfer_still_lets_the_other_ranks_finish(
    folder: Path, engine: EngineProcess
) -> None:
    """The sender walks through the source all the same: sharded parameters are gathered by all ranks."""

    class Counting(ModuleWeightSource):
        passes = 0

        def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
            yield from super().iter_groups()
            self.passes += 1

    source = Counting(load(folder), torch.float32, zero_stage=0)
    publisher = connect(source, [engine], timeout=5.0)
    engine.process.kill()
    engine.process.join()
    with pytest.raises(WeightSyncError, match="publishing version 0: BrokenPipeError"):
        publisher.publish(0)
    assert source.passes == 1


def test_an_engine_that_never_joins_fails_the_connection_in_time(folder: Path) -> None:
    class Absent:
        def init_weight_transfer_engine(self, init_info: Payload) -> Pending[None]:
            return Done(None)

    start = time.monotonic()
    with pytest.raises(WeightSyncError, match="not everyone joined within 1 s"):
        connect(ModuleWeightSource(load(folder), torch.float32, 0), [Absent()], timeout=1.0)  # type: ignore[list-item]
    assert time.monotonic() - start < 8.0


def test_another_model_is_refused_by_name_and_a_new_publisher_repairs(
    folder: Path, engine: EngineProcess, tmp_path: Path
) -> None:
    wider = load(tiny_model_folder(tmp_path, layers=3))
    publisher = connect(ModuleWeightSource(wider, torch.float32, zero_stage=0), [engine])
    with pytest.raises(
        WeightSyncError, match=r"engine 0: .*9 parameters .* model\.layers\.2\.input_layernorm"
    ):
        publisher.publish(0)
    model = load(folder)
    perturb(model, 0.05, seed=1)
    connect(ModuleWeightSource(model, torch.float32, zero_stage=0), [engine]).publish(7)
    got = engine.call("token_logprobs", PROBE).result().values
    np.testing.assert_allclose(got, trainer_logprobs(model, PROBE), atol=1e-5)


def test_a_source_that_contradicts_its_metadata_is_named(folder: Path, engine: EngineProcess) -> None:
    class Lying(ModuleWeightSource):
        def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
            for names, tensors in super().iter_groups():
                yield names, [tensor.bfloat16() for tensor in tensors]

    publisher = connect(Lying(load(folder), torch.float32, zero_stage=0), [engine], timeout=2.0)
    with pytest.raises(
        WeightSyncError, match=r"announced model\.embed_tokens\.weight torch\.float32.*bfloat16"
    ):
        publisher.publish(0)


@dataclass
class Recorder:
    """An engine's control plane that writes down what it is told and when it is waited for."""

    name: str
    log: list[tuple[str, str, object]]
    fails: bool = False

    def init_weight_transfer_engine(self, init_info: Payload) -> Pending[None]:
        self.log.append((self.name, "start", init_info["rank_offset"]))
        return self

    def update_weights(self, update_info: Payload) -> Pending[None]:
        self.log.append((self.name, "start", update_info))
        return self

    def result(self) -> None:
        self.log.append((self.name, "wait", None))
        if self.fails:
            raise RuntimeError(f"{self.name} is full")


def test_engines_get_their_own_ranks_and_all_start_before_any_is_waited_for() -> None:
    log: list[tuple[str, str, object]] = []
    client = MultiEngineClient([Recorder(name, log) for name in "abc"], tensor_parallel_size=4)  # type: ignore[misc]
    assert client.num_receivers == 12
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 13})
    assert log == [("a", "start", 1), ("b", "start", 5), ("c", "start", 9)] + [
        (n, "wait", None) for n in "abc"
    ]


def test_all_engines_failures_are_told() -> None:
    engines = [Recorder("a", [], fails=True), Recorder("b", []), Recorder("c", [], fails=True)]
    client = MultiEngineClient(engines, tensor_parallel_size=1)  # type: ignore[arg-type]
    with pytest.raises(WeightSyncError) as caught:
        client.update_weights({})
    assert str(caught.value) == (
        "update_weights: engine 0: RuntimeError: a is full; engine 2: RuntimeError: c is full"
    )


def test_backend_follows_the_placement() -> None:
    assert choose_backend([], []) == "gloo"
    assert choose_backend(["n0:0", "n0:1"], ["n0:2"]) == "nccl"
    assert choose_backend(["n0:0", "n0:1"], ["n0:1"]) == "ipc"
    with pytest.raises(ResourceError, match="share n0:1 with the policy"):
        choose_backend(["n0:0", "n0:1"], ["n0:1", "n1:0"])
