"""The entry point by which vLLM learns of the backend."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_registering_twice_is_harmless_and_imports_nothing_heavy() -> None:
    pytest.importorskip("vllm")
    code = (
        "import sys\n"
        "from rlhf_ray.weights.plugin import register\n"
        "assert 'torch' not in sys.modules\n"
        "register()\n"
        "register()\n"
        "assert 'rlhf_ray.weights.gloo_worker' not in sys.modules\n"
        "from vllm.distributed.weight_transfer import WeightTransferEngineFactory as E\n"
        "from vllm.distributed.weight_transfer import WeightTransferTrainerFactory as T\n"
        "print(E._registry['gloo']().__name__, T._registry['gloo']().__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = done.stdout.split()[-2:]
    assert names == ["GlooWeightTransferEngine", "GlooTrainerWeightTransferEngine"]


def test_a_trainer_that_sends_over_gloo_does_not_import_vllm() -> None:
    code = (
        "import sys, rlhf_ray.weights.sync, rlhf_ray.weights.source, rlhf_ray.engines.hf_generator\n"
        "assert 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
