"""Memory that the sender of weights and its receivers see in common, where all of them are on one machine."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch
from torch.distributed import Store

FOLDER = Path("/dev/shm")
NAME, SHARED = "shared memory: name", "shared memory: all have it"


def offer(store: Store, num_receivers: int, num_bytes: int) -> torch.Tensor | None:
    """The sender's part of an agreement of which `accept` is the receivers'.

    Returns:
        [num_bytes] uint8, or None for all where a receiver is elsewhere or there is no room. The file has no
        name any more: its memory goes with the last process that holds it.
    """
    path = FOLDER / f"rlhf_ray-{uuid4().hex}"
    try:
        memory = _map(path, num_bytes) if _has_room(num_bytes) else None
        store.set(NAME, path.name if memory is not None else "")
        answers = [store.get(_answer(rank)) for rank in range(1, num_receivers + 1)]
    finally:
        with suppress(OSError):
            path.unlink()
    is_shared = memory is not None and all(answer == b"yes" for answer in answers)
    store.set(SHARED, "yes" if is_shared else "no")
    return memory if is_shared else None


def accept(store: Store, rank: int) -> torch.Tensor | None:
    """The same memory as the sender's, or None. On another machine there is no file of that name."""
    name = store.get(NAME).decode()
    memory = _map(FOLDER / name) if name else None
    store.set(_answer(rank), "yes" if memory is not None else "no")
    return memory if store.get(SHARED) == b"yes" else None


def _has_room(num_bytes: int) -> bool:
    """Half of the folder is left to others: Ray's object store grows there and ends with what cannot."""
    try:
        found = os.statvfs(FOLDER)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize - num_bytes >= found.f_blocks * found.f_frsize / 2


def _answer(rank: int) -> str:
    return f"shared memory: rank {rank}"


def _map(path: Path, new_bytes: int = 0) -> torch.Tensor | None:
    """A file in memory; a new one where its size is given. None where that cannot be."""
    try:
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if new_bytes else 0), 0o600)
    except OSError:
        return None
    try:
        if new_bytes:
            # Now, since a page that is missing later ends the process.
            os.posix_fallocate(descriptor, 0, new_bytes)
        return torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8)
    except OSError:
        return None
    finally:
        os.close(descriptor)
