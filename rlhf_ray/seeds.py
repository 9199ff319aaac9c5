"""Seeds for parts of a run, derived from the run's one seed."""

from __future__ import annotations

import numpy as np


def derive_seed(*parts: int) -> int:
    """31 bits that depend on all parts (seed, step, ...); other parts give unrelated seeds, on every machine alike."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)
