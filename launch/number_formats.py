"""What `auto` stands for in `training.precision` and `engine.dtype`, on the hardware of this cluster."""

from __future__ import annotations

from collections.abc import Callable

import ray

from rlhf_ray.config.schema import RunConfig
from rlhf_ray.engines.number_formats import cpu_multiplies_bfloat16


def with_number_formats(config: RunConfig, say: Callable[[str], None]) -> RunConfig:
    """The configuration with both settled, once for all roles: equal weights give equal numbers only if all
    compute alike. Ray is connected; on a cluster without GPUs its machines are taken to be as this one is."""
    auto = [
        name
        for name, value in (
            ("training.precision", config.training.precision),
            ("engine.dtype", config.engine.dtype),
        )
        if value == "auto"
    ]
    has_bfloat16 = ray.cluster_resources().get("GPU", 0) > 0 or cpu_multiplies_bfloat16()
    if auto and not has_bfloat16:
        say(f"{' and '.join(auto)}: float32, since this CPU does not multiply bfloat16 numbers (no AVX-512)")
    training, engine = config.training, config.engine
    if training.precision == "auto":
        training = training.model_copy(update={"precision": "mixed" if has_bfloat16 else "float32"})
    if engine.dtype == "auto":
        engine = engine.model_copy(update={"dtype": "bfloat16" if has_bfloat16 else "float32"})
    return config.model_copy(update={"training": training, "engine": engine})
