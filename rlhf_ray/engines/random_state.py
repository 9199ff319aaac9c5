"""The random state of a process in a file: torch's, a GPU's, numpy's and Python's.

Every rank has a file of its own: DeepSpeed keeps what it is given of the first rank only.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch


def random_path(folder: Path, rank: int) -> Path:
    return folder / f"random-{rank:05d}.pt"


def seed_everything(seed: int) -> None:
    """Whoever draws from the libraries' own generators (a person's loss, say) draws the same in every run."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def save_random_state(path: Path) -> None:
    """As tensors and plain values, which are read back without unpickling anything else."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, path)


def load_random_state(path: Path) -> None:
    """Raises: OSError, RuntimeError, UnpicklingError: missing or damaged."""
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
