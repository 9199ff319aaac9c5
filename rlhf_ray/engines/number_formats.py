"""Which number formats the hardware computes in."""

from __future__ import annotations

import torch


def cpu_multiplies_bfloat16() -> bool:
    """Whether matrix products in bfloat16 have kernels here. Without AVX-512 torch falls back to loops that
    take some fifty times as long as float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiplies_bfloat16() -> bool:
    return torch.cuda.is_available() or cpu_multiplies_bfloat16()
