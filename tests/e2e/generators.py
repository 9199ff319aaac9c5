"""A generation engine whose weight sync is broken."""

from __future__ import annotations

from rlhf_ray.engines.hf_generator import HFGenerator
from rlhf_ray.weights.broadcast import NamedTensors


class DeafGenerator(HFGenerator):
    """Receives every tensor, says that all is well, and keeps what it has."""

    def _load(self, weights: NamedTensors) -> None:
        for _ in weights:
            pass
