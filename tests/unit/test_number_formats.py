"""What `auto` becomes: bfloat16 where the hardware multiplies it, float32 on older CPUs."""

from __future__ import annotations

import pytest
import ray

from launch import number_formats
from launch.number_formats import with_number_formats
from rlhf_ray.config.loading import load_config


@pytest.fixture
def settled(monkeypatch):
    """(overrides, GPUs of the cluster, whether the CPU can) -> (precision, dtype, what was said)."""

    def settle(overrides, gpus, can):
        monkeypatch.setattr(
            ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": gpus} if gpus else {"CPU": 2.0}
        )
        monkeypatch.setattr(number_formats, "cpu_multiplies_bfloat16", lambda: can)
        said = []
        config = with_number_formats(load_config("grpo-arithmetic", overrides), said.append)
        return config.training.precision, config.engine.dtype, said

    return settle


@pytest.mark.parametrize(("gpus", "can"), [(0, True), (8.0, False)])
def test_bfloat16_where_it_is_fast(settled, gpus, can):
    assert settled([], gpus, can) == ("mixed", "bfloat16", [])


def test_float32_on_a_cpu_that_cannot(settled):
    precision, dtype, said = settled([], 0, can=False)
    assert (precision, dtype) == ("float32", "float32")
    assert len(said) == 1 and "training.precision and engine.dtype" in said[0]


def test_what_is_asked_for_stays(settled):
    words = ["training.precision=mixed", "engine.dtype=bfloat16"]
    assert settled(words, 0, can=False) == ("mixed", "bfloat16", [])
    assert settled(["training.precision=float32"], 0, can=True) == ("float32", "bfloat16", [])
