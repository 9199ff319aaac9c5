"""Seeds for parts of a run, derived from the run's one seed."""

from __future__ import annotations

import struct
from hashlib import blake2b


def derive_seed(*parts: int) -> int:
    """31 bits that depend on all parts (seed, step, ...); other parts give unrelated seeds, in every process.

    numpy's `SeedSequence` alone would not do: it pads with zeros, so that (7,) and (7, 0) are the same to it.
    """
    digest = blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
