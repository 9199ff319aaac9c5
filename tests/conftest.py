"""Fixtures of all tests: a Ray cluster for a module, the command line and TRL in own processes, and GPUs."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.command_line import CommandLine
from tests.e2e.runs import make_workplace
from tests.leftovers import forget_ranks

GIB = 1 << 30


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """Ray on two CPUs, for one test module, in a folder of its own and apart from any other Ray here."""
    import ray

    # Not pytest's folder: Ray puts sockets there, whose paths may have no more than 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        object_store_memory=300 << 20,
        _memory=16 * GIB,
        _temp_dir=str(folder),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


class WholeRunsApart(LoadScopeScheduling):
    """All that starts Ray follows each other in one process, since two such tests at a time take longer than
    one after the other; files of unit tests go to whichever is free."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if "/unit/" in file else "whole runs"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> WholeRunsApart:
    return WholeRunsApart(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none"))


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a reward function and configurations: where the commands of tests run."""
    return make_workplace(tmp_path_factory.mktemp("workplace") / "here")


@pytest.fixture(scope="session")
def rlhf_ray(workplace: Path) -> CommandLine:
    """The command line, run in the workplace."""
    return CommandLine(workplace)


@pytest.fixture(scope="session")
def trl_process() -> Iterator[Executor]:
    """A process that may import TRL, and with it vLLM and Ray; one, since the import takes long."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=forget_ranks) as executor:
        yield executor
