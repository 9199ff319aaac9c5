"""The mathematics: pure functions over tensors, and the table of the algorithms composed of them."""

from rlhf_ray.algorithms.table import ALGORITHMS, AdvantageInputs, Advantages, Algorithm

__all__ = ["ALGORITHMS", "AdvantageInputs", "Advantages", "Algorithm"]
