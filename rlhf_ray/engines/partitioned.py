"""Models of which every rank holds a part (ZeRO 3): loaded so, and, where they are frozen, run so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def loading_in_parts(config: Mapping[str, object], *, enabled: bool) -> Iterator[None]:
    """In the block `from_pretrained` leaves each rank its part, so that no process ever holds the whole.

    Args:
        config: DeepSpeed's, with ZeRO 3.
    """
    if not enabled:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # It applies to every model that is loaded while it is referenced.
    held = HfDeepSpeedConfig(dict(config))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del held


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """In the block a layer that is held in parts has all of its own parameters, and keeps what is written
    into them, alike on every rank."""
    parameters = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_id")]
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=bool(parameters)):
        yield


class FrozenParts:
    """A model that is only read, and of which each rank of the world holds a part.

    Every rank has to do the same forward passes at the same time.
    """

    def __init__(self, build: Callable[[], nn.Module], device: torch.device) -> None:
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10_000},
            "steps_per_print": 1 << 30,
        }
        with loading_in_parts(config, enabled=True):
            module = build().eval().requires_grad_(False)
        self.device = device
        self.engine: Any = deepspeed.initialize(model=module, config=config)[0]
        self.engine.eval()

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return self.engine(*args, **kwargs)

    def to(self, device: torch.device | str) -> None:
        """Move this rank's part."""
        for parameter in self.engine.module.parameters():
            part = parameter.ds_tensor
            part.data = part.data.to(device)
