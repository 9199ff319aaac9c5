"""What of a trained model is not on its device: always (offload), or while others have the device (rest).

On a CPU the same calls run, and move nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rlhf_ray.config.schema import TrainingSection


def offload_config(training: TrainingSection, *, pin_memory: bool) -> dict[str, object]:
    """What is kept elsewhere all the time, in the words of DeepSpeed's `zero_optimization`.

    Adam then steps in main memory, by torch's own fused kernel: DeepSpeed's has to be compiled.
    """
    places = {"offload_optimizer": training.offload_optimizer, "offload_param": training.offload_parameters}
    return {
        key: {
            "device": place,
            "pin_memory": pin_memory,
            **({"nvme_path": training.nvme_path} if place == "nvme" else {}),
        }
        for key, place in places.items()
        if place != "none"
    }


class DeviceState:
    """Of a DeepSpeed engine at ZeRO 1 to 3: weights, gradients, the optimizer's weights and moments.

    Between `rest` and `wake` the model may not be used.
    """

    def __init__(self, engine: Any, training: TrainingSection, device: torch.device) -> None:
        """
        Args:
            engine: DeepSpeed's, of an AdamW.
        """
        self._engine = engine
        self._training = training
        self._device = device

    def rest(self) -> None:
        if self._training.offload_parameters == "none":
            # Pinned memory, from which copies are fast, is for devices that copy.
            self._engine.offload_states(include=self._moved_by_library(), pin_memory=self._on_gpu)
            self._move_rest("cpu")
        if self._on_gpu:
            torch.cuda.empty_cache()

    def wake(self) -> None:
        if self._training.offload_parameters == "none":
            self._move_rest(str(self._device))
            self._engine.reload_states()

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def _moved_by_library(self) -> list[object] | None:
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

        if self._training.zero_stage < 3:
            return None  # everything
        # At stage 3 it moves the rest for its own FusedAdam alone, which has to be compiled.
        return [State.lp_params, State.lp_grads, State.contiguous_grad_buffer]

    def _move_rest(self, device: str) -> None:
        from deepspeed.runtime.zero.offload_states import offload_optimizer_states

        zero = self._engine.optimizer
        if self._training.zero_stage == 3 and self._training.offload_optimizer == "none":
            for flat in zero.fp32_partitioned_groups_flat:
                flat.data = flat.data.to(device)
            offload_optimizer_states(zero.optimizer, device)
        module: nn.Module = self._engine.module
        for parameter in module.parameters():
            if not parameter.requires_grad:  # below stage 3 the library knows only of what is trained
                parameter.data = parameter.data.to(device)
