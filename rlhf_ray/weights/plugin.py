"""Makes the weight transfer backend `gloo` known to vLLM.

Entry point of the group `vllm.general_plugins`: vLLM calls `register` in every process that it starts,
workers included, before an engine is built.
"""

from __future__ import annotations

BACKEND = "gloo"
_WORKER = ("rlhf_ray.weights.gloo_worker", "GlooWeightTransferEngine")
_TRAINER = ("rlhf_ray.weights.gloo", "GlooTrainerWeightTransferEngine")


def register() -> None:
    """Add the backend to vLLM's two registries, by name, so that its module is imported only where it is
    used.

    vLLM may call plugins several times in one process, and its registries refuse a name that they know.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, *_WORKER)
    if BACKEND not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(BACKEND, *_TRAINER)
