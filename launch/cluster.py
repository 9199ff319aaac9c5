"""The Ray cluster of a run: started for it on this machine, or joined."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import ray

from launch.interrupts import sigterm_kept
from rlhf_ray.config.schema import ClusterSection
from rlhf_ray.errors import ResourceError

MIB = 1 << 20
SPARE_MEMORY = 0.9
"""Share of the available memory that the roles may ask for; the rest is for the driver and the page cache."""


@contextmanager
def cluster(section: ClusterSection) -> Iterator[None]:
    """A connection to Ray for the time of the block. One that the caller opened before is used and left open.

    Raises:
        ResourceError: no cluster answers at `cluster.address`.
        KeyboardInterrupt: SIGTERM while it was starting.
    """
    if ray.is_initialized():
        yield
        return
    # Ray would otherwise warn at every start about behaviour that does not concern us.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if section.address is None:
            _start(section.object_store_mib * MIB)
        else:
            _join(section.address)
        yield
    finally:
        ray.shutdown()


def _start(store: int) -> None:
    with sigterm_kept():
        ray.init(
            # Said, since Ray would otherwise join whatever runs here, or what RAY_ADDRESS names.
            address="local",
            num_cpus=usable_cpus(),
            object_store_memory=store,
            _memory=max(0, int(psutil.virtual_memory().available * SPARE_MEMORY) - store),
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )


def _join(address: str) -> None:
    try:
        if address != "auto":
            _knock(address)
        with sigterm_kept():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    # Ray ends the process when a cluster that it knows of does not answer.
    except (OSError, ValueError, RuntimeError, SystemExit) as error:
        reason = str(error).strip().splitlines()[0]
        raise ResourceError(
            f"cluster.address={address}: no Ray cluster answers there ({reason}); start one with "
            "`ray start --head`, or leave the address out to use this machine"
        ) from None


def _knock(address: str) -> None:
    """Ray itself tries for seven minutes.

    Raises:
        OSError: nobody listens. ValueError: not host:port.
    """
    host, separator, port = address.rpartition(":")
    if not (host and separator and port.isdigit()):
        raise ValueError("write it as host:port, or auto")
    with socket.create_connection((host, int(port)), timeout=10):
        pass


def usable_cpus() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))
