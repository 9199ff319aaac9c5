"""What tests leave behind in their process. Not in conftest.py, where pickle would not find it."""

from __future__ import annotations

import os


def forget_ranks() -> None:
    """Engines of other tests leave these behind, and TRL would start a process group of its own by them."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
