"""Splits rows into training and held-out rows that share no prompt."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.errors import DataError
from rlhf_ray.types import Message

Indices = NDArray[np.int64]


def split_key(messages: Sequence[Message], split_by: Literal["prompt", "first_turn"]) -> str:
    """What two rows must not share across the split: the whole prompt, or the user's first turn.

    Dialogues that were continued in several ways share their first turn only.
    """
    if split_by == "first_turn":
        return next(turn["content"] for turn in messages if turn["role"] == "user").strip()
    return json.dumps([[turn["role"], turn["content"]] for turn in messages])


def split_rows(keys: Sequence[str], held_out: float, seed: int) -> tuple[Indices, Indices]:
    """Row numbers for training and for testing, both ascending; rows of equal key stay on one side.

    Keys are taken in the order of their SHA-256 with the seed, until enough rows are held out, so that the
    order of the rows does not matter, and a row more moves few others.

    Args:
        keys: [B] one a row.
        held_out: a fraction of the rows (below 1; at least one row), or a number of rows. The last key's rows
            come whole, so a few more may be held out.

    Raises:
        DataError: `held_out` is not such a number, or leaves nothing to train on.
    """
    if not held_out > 0 or (held_out >= 1 and held_out != int(held_out)):
        raise DataError(f"held_out={held_out}: must be a fraction between 0 and 1, or a whole number of rows")
    wanted = max(1, round(held_out * len(keys))) if held_out < 1 else int(held_out)
    sizes = Counter(keys)
    num_held_out, held_out_keys = 0, set()
    for key in sorted(sizes, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest()):
        if num_held_out >= wanted:
            break
        held_out_keys.add(key)
        num_held_out += sizes[key]
    if num_held_out >= len(keys):
        raise DataError(
            f"held_out={held_out}: leaves nothing to train on: there are {len(keys)} rows with {len(sizes)} "
            "different keys; hold out fewer rows or use more data"
        )
    is_test = np.asarray([key in held_out_keys for key in keys], dtype=np.bool_)
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)
