"""transformers' `generate` as the generation engine: slow and simple, for machines without vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    TopPLogitsWarper,
)

from rlhf_ray.config.schema import EngineSection
from rlhf_ray.engines.generation import UNKNOWN_VERSION, Request, Sample, TokenGenerator, read_eos_ids
from rlhf_ray.errors import GenerationError, WeightSyncError
from rlhf_ray.types import Ragged, SamplingSpec
from rlhf_ray.weights.broadcast import BroadcastPlan, Endpoint, NamedTensors, WeightGroup


class HFGenerator(TokenGenerator):
    """One model in this process. Receives weights over gloo, whatever device it is on."""

    def __init__(
        self,
        model_folder: str,
        section: EngineSection,
        max_model_len: int,
        *,
        threads: int,
        version: int = UNKNOWN_VERSION,
    ) -> None:
        """
        Args:
            model_folder: Hugging Face folder; its generation_config names the tokens that end a response.
            threads: CPU threads of this process.
            version: as in `TokenGenerator`.
        """
        super().__init__(max_model_len, version)
        torch.set_num_threads(threads)
        self.batch_size = section.max_num_seqs
        self._eos_ids = list(read_eos_ids(model_folder))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Any: transformers' annotations of `to` and `generate` do not fit its own classes.
        dtype = getattr(torch, section.number_format)
        read = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype, use_safetensors=True)
        self._model = cast(Any, read)
        self._model.to(self._device).eval()
        # Every setting is given with the call; the folder's own sampling defaults must not slip in.
        self._model.generation_config = type(self._model.generation_config)()
        self._group: WeightGroup | None = None
        self._has_all = False

    @torch.no_grad()
    def token_logprobs(self, sequences: Ragged) -> Ragged:
        rows = []
        for tokens in sequences:
            ids = torch.as_tensor(np.array(tokens), dtype=torch.long, device=self._device)
            logits = self._model(ids[None], use_cache=False).logits[0, :-1].float()
            logprobs = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            rows.append(logprobs.cpu().numpy())
        return Ragged.from_rows(rows, np.float32)

    def init_weight_transfer_engine(self, init_info: dict[str, object]) -> None:
        endpoint = Endpoint(**init_info)  # type: ignore[arg-type]
        if self._group is not None:
            self._group.close()
        self._has_all = False
        self._group = WeightGroup(
            endpoint.master_address,
            endpoint.master_port,
            endpoint.rank_offset,
            endpoint.world_size,
            endpoint.timeout,
        )

    def rest(self) -> None:
        self._model.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self, weights_only: bool = False) -> None:
        self._model.to(self._device)

    def start_weight_update(self) -> None:
        """From here to `finish_weight_update` the engine holds neither the old weights nor the new ones."""
        self._version = UNKNOWN_VERSION

    def update_weights(self, update_info: dict[str, object]) -> None:
        """Raises: WeightSyncError if the announced tensors are not the model's parameters: at first all of
        them."""
        if self._group is None:
            raise WeightSyncError("weights were announced to an engine that has not joined a trainer")
        plan = BroadcastPlan(**update_info)  # type: ignore[arg-type]
        announced = {name: tuple(shape) for name, shape in zip(plan.names, plan.shapes, strict=True)}
        own = {name: tuple(parameter.shape) for name, parameter in self._model.named_parameters()}
        wanted = announced.keys() if self._has_all else announced.keys() | own.keys()
        different = sorted(name for name in wanted if announced.get(name) != own.get(name))
        if different:
            name = different[0]
            self._group.close()
            raise WeightSyncError(
                f"{len(different)} parameters of trainer and engine differ in name or shape, the first is "
                f"{name}: {announced.get(name)} in the trainer, {own.get(name)} in the engine"
            )
        self._group.receive_all(plan, self._load)
        self._has_all = True

    def finish_weight_update(self, weight_version: str) -> None:
        self._version = int(weight_version)

    @torch.no_grad()
    def _load(self, weights: NamedTensors) -> None:
        for name, tensor in weights:
            self._model.get_parameter(name).copy_(tensor)

    def _sample(self, requests: Sequence[Request], sampling: SamplingSpec) -> list[Sample]:
        if sampling.fixed_lengths is not None:
            raise GenerationError("engine.backend=transformers: answers of fixed lengths need vllm")
        batches = range(0, len(requests), self.batch_size)
        return [
            sample
            for start in batches
            for sample in self._sample_batch(requests[start : start + self.batch_size], sampling)
        ]

    @torch.no_grad()
    def _sample_batch(self, requests: Sequence[Request], sampling: SamplingSpec) -> list[Sample]:
        width = max(len(request.token_ids) for request in requests)
        tokens = torch.full((len(requests), width), self._eos_ids[0], dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, request in enumerate(requests):
            tokens[row, width - len(request.token_ids) :] = torch.tensor(request.token_ids)
            mask[row, width - len(request.token_ids) :] = 1
        sampler = _SeededSampler([request.seed for request in requests], sampling)
        output = self._model.generate(
            tokens.to(self._device),
            attention_mask=mask.to(self._device),
            # The processor below samples; what is left to choose from is one token.
            do_sample=False,
            logits_processor=LogitsProcessorList([sampler]),
            max_new_tokens=sampling.max_completion_length,
            min_new_tokens=sampling.min_completion_length,
            eos_token_id=self._eos_ids,
            pad_token_id=self._eos_ids[0],
        )
        responses = output[:, width:].cpu().numpy()
        logprobs = torch.stack(sampler.logprobs, dim=1).cpu().numpy()
        return [self._cut(*row) for row in zip(responses, logprobs, strict=True)]

    def _cut(self, tokens: np.ndarray, logprobs: np.ndarray) -> Sample:
        """A row up to its first EOS; what follows is padding."""
        ends = np.flatnonzero(np.isin(tokens, self._eos_ids))
        length = int(ends[0]) + 1 if len(ends) else len(tokens)
        return Sample(
            token_ids=tokens[:length],
            logprobs=logprobs[:length],
            versions=[self._version] * length,
            finished=len(ends) > 0,
        )


class _SeededSampler(LogitsProcessor):
    """Samples every row with a random generator of its own, so that a row does not depend on its neighbours.

    Gumbel-max: argmax_v (z_v + g_v) with independent standard Gumbel g is a sample of softmax(z) (Maddison,
    Tarlow and Minka 2014, eq. 2).
    """

    def __init__(self, seeds: Sequence[int], sampling: SamplingSpec) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = sampling.temperature
        self._nucleus = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        self.logprobs: list[torch.Tensor] = []
        """One entry a step: [B] float32, of the token chosen."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """
        Args:
            scores: [B, V] logits, -inf for EOS tokens before the least length.

        Returns:
            [B, V] 0 at the chosen token, -inf elsewhere.
        """
        logits = scores.float()
        if self._temperature > 0:
            logits = logits / self._temperature
            if self._nucleus is not None:
                logits = self._nucleus(input_ids, logits)
            chosen = (logits + self._gumbel(logits)).argmax(-1, keepdim=True)
        else:
            chosen = logits.argmax(-1, keepdim=True)
        self.logprobs.append(logits.log_softmax(-1).gather(-1, chosen)[:, 0])
        return torch.full_like(logits, -torch.inf).scatter(-1, chosen, 0.0)

    def _gumbel(self, logits: torch.Tensor) -> torch.Tensor:
        vocabulary = logits.shape[-1]
        exponential = torch.stack(
            [torch.empty(vocabulary).exponential_(generator=generator) for generator in self._generators]
        )
        return -exponential.log().to(logits.device)
