"""The least that bringing new weights into an engine takes: what publishing is measured against.

A trainer that holds float32 weights and an engine, each in a process of its own, as ours are. One copy of all
weights into a flat message in the engine's type, one broadcast of it, and vLLM's own reload of the tensors as
they lie there. Nothing is announced or checked, and nobody is asked whether it worked.
"""

from __future__ import annotations

from datetime import timedelta
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import reduce_tensor

from rlhf_ray.config.schema import EngineSection
from rlhf_ray.engines.vllm_generator import VLLMGenerator
from rlhf_ray.types import Ragged
from rlhf_ray.weights.gloo_worker import repack_heads

TIMEOUT = timedelta(seconds=60)
Backend = Literal["gloo", "nccl", "ipc"]
Layout = list[tuple[str, torch.Size]]


class Transfer:
    """Two processes and one broadcast between them: gloo, or nccl where each has a GPU of its own; where they
    share one, the message's memory is the same for both (`ipc`), and there is nothing to send."""

    def __init__(self, rank: int, port: int, backend: Backend) -> None:
        self._group: Any = None
        if backend == "ipc":
            return
        # A group of its own: the engine has given the default one to its workers.
        store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=TIMEOUT, wait_for_workers=False)
        if backend == "gloo":
            self._group = dist.ProcessGroupGloo(store, rank, 2, TIMEOUT)
        else:
            self._group = dist.ProcessGroupNCCL(store, rank, 2, dist.ProcessGroupNCCL.Options())

    def broadcast(self, flat: torch.Tensor) -> None:
        if self._group is not None:
            self._group.broadcast([flat], dist.BroadcastOptions()).wait()
        if flat.is_cuda:
            torch.cuda.synchronize()


class FloorTrainer:
    """The sender."""

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = loaded.to(device).eval()
        count = sum(parameter.numel() for parameter in self._model.parameters())
        self._flat = torch.empty(count, dtype=getattr(torch, dtype), device=device)
        self._flat.zero_()  # its pages are there before the first time counts

    def connect(self, port: int, backend: Backend) -> None:
        self._transfer = Transfer(0, port, backend)

    def layout(self) -> Layout:
        return [(name, parameter.shape) for name, parameter in self._model.named_parameters()]

    def handle(self) -> tuple[Any, ...]:
        """By which another process opens the message on the same GPU."""
        return reduce_tensor(self._flat)

    @torch.no_grad()
    def step(self, seed: int, scale: float) -> None:
        """Move every weight at random, by a share of the spread of its neighbours."""
        generator = torch.Generator(self._flat.device).manual_seed(seed)
        for parameter in self._model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            parameter += scale * parameter.std() * noise

    @torch.no_grad()
    def send(self) -> None:
        start = 0
        for parameter in self._model.parameters():
            self._flat[start : start + parameter.numel()].view(parameter.shape).copy_(parameter)
            start += parameter.numel()
        self._transfer.broadcast(self._flat)

    @torch.no_grad()
    def probe(self, sequences: Ragged) -> Ragged:
        """Log-probs of all tokens after each row's first, as our trainer computes them."""
        rows = []
        for tokens in sequences:
            ids = torch.tensor(tokens.tolist(), device=self._flat.device)
            is_mixed = self._flat.dtype == torch.bfloat16
            with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=is_mixed):
                logits = self._model(ids[None], use_cache=False).logits[0, :-1].float()
            logprobs = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            rows.append(logprobs.cpu().numpy())
        return Ragged.from_rows(rows, np.float32)


class FloorEngine(VLLMGenerator):
    """The receiver: the engine itself is built as ours is; how weights come to it is not ours."""

    def __init__(self, model: str, section: EngineSection, max_model_len: int, threads: int) -> None:
        super().__init__(model, section, max_model_len, threads=threads, seed=0, version=0)
        self._dtype = getattr(torch, section.number_format)

    def connect(
        self, port: int, backend: Backend, layout: Layout, handle: tuple[Any, ...] | None = None
    ) -> None:
        self._transfer = Transfer(1, port, backend)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sizes = [shape.numel() for _, shape in layout]
        if handle is None:
            self._flat = torch.zeros(sum(sizes), dtype=self._dtype, device=device)
        else:
            rebuild, arguments = handle
            self._flat = rebuild(*arguments)
        self._tensors = [
            (name, self._flat[end - size : end].view(shape))
            for (name, shape), size, end in zip(layout, sizes, accumulate(sizes), strict=True)
        ]

    def receive(self) -> None:
        """On return the engine samples with the new weights."""
        self._transfer.broadcast(self._flat)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(self._tensors)})
        if not self._flat.is_cuda:
            # Without it the engine would not hold the new weights: vLLM leaves tied heads out.
            self._llm.apply_model(repack_heads)
        self._llm.reset_prefix_cache()
