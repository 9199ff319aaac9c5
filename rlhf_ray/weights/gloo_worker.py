"""The receiving end of the backend `gloo`, in a vLLM worker: layers come as if from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rlhf_ray.errors import WeightSyncError
from rlhf_ray.weights.broadcast import BroadcastPlan, Endpoint, NamedTensors, WeightGroup

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass
class GlooInitInfo(Endpoint, WeightTransferInitInfo):
    """What a worker is told when it joins; every worker of an engine adds its own rank to `rank_offset`."""


@dataclass
class GlooUpdateInfo(BroadcastPlan, WeightTransferUpdateInfo):
    """What a worker is told before each transfer."""


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The receiving end, in a vLLM worker."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(
        self,
        config: WeightTransferConfig,
        vllm_config: VllmConfig,
        device: torch.device,
        model: torch.nn.Module,
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._group: WeightGroup | None = None
        self._parameter_names = frozenset(name for name, _ in model.named_parameters())
        self._loaded: set[str] = set()

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join; a second call leaves the first group, as when the trainer comes back after a failure."""
        self.shutdown()
        self._loaded = set()
        parallel = self.parallel_config
        worker_rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group = WeightGroup(
            init_info.master_address,
            init_info.master_port,
            init_info.rank_offset + worker_rank,
            init_info.world_size,
            init_info.timeout,
        )

    def start_weight_update(self) -> None:
        """Bring the layers back into the form in which a checkpoint is loaded.

        On CPU the linear weights live only as prepacked copies; loading into them directly is impossible.
        """
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        if self._group is None:
            raise WeightSyncError("weights were announced to an engine that has not joined a trainer")
        self._group.receive_all(update_info, self._load)

    def finish_weight_update(self) -> None:
        """Rebuild what the kernels use, tied heads included. A layer that got no weights keeps those it has.

        Raises:
            WeightSyncError: parameters of the model have got no weights since this engine joined.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        repack_heads(self.model)
        missing = sorted(self._parameter_names - self._loaded)
        if missing:
            raise WeightSyncError(
                f"{len(missing)} of the engine's {len(self._parameter_names)} parameters got no weights from "
                f"the trainer: {', '.join(missing[:5])}"
            )

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def _load(self, weights: NamedTensors) -> None:
        self._loaded |= self.model.load_weights(weights)  # type: ignore[operator]


def repack_heads(model: torch.nn.Module) -> None:
    """Rebuild the output heads' prepacked weights from their current ones.

    A head that shares its weight with the embedding gets no weights of its own, so the layerwise reload
    leaves it out, and on CPU its kernel goes on using the copy that was packed from the old embedding.
    Nothing fails: the engine samples from a mixture of old and new weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
