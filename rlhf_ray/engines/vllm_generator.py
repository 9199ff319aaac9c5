"""vLLM as the generation engine, on CPU and GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch

from rlhf_ray.config.schema import EngineSection, KVOnUpdate
from rlhf_ray.engines.generation import (
    UNKNOWN_VERSION,
    Ask,
    Request,
    Sample,
    SteppedGenerator,
    read_eos_ids,
)
from rlhf_ray.errors import GenerationError, WeightSyncError
from rlhf_ray.types import Array, Ragged, SamplingSpec

if TYPE_CHECKING:
    from vllm import LLM, PoolingRequestOutput, RequestOutput, SamplingParams

ENVIRONMENT = {
    # The engine's scheduler in this process: one less to start, to watch and to lose.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The thread count is this process's own; binding would put every engine of a machine on the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    # The model is a folder; nothing has to be looked up elsewhere.
    "HF_HUB_OFFLINE": "1",
}
MEMORY = ("weights", "kv_cache")
"""What an engine has on its device, by vLLM's names, in the order in which it comes back."""
CPU_BATCHED_TOKENS = 4096
"""Tokens of one forward pass of the engine."""
CPU_BLOCK_TOKENS = 32
"""The fewest that the CPU's kernels are made for. Answers of a group share the full blocks of their prompt,
and of vLLM's 128 tokens a short prompt fills none."""


class VLLMGenerator(SteppedGenerator):
    """One vLLM engine with all its tensor-parallel workers.

    Nothing may be trained in a process that holds one: vLLM replaces `torch.set_num_threads`.
    """

    def __init__(
        self,
        model_folder: str,
        section: EngineSection,
        max_model_len: int,
        *,
        threads: int,
        seed: int,
        weight_backend: str = "gloo",
        version: int = UNKNOWN_VERSION,
        kv_on_update: KVOnUpdate | None = None,
        sleeps: bool = False,
    ) -> None:
        """
        Args:
            model_folder: Hugging Face folder; its generation_config names the tokens that end a response.
            threads: CPU threads of the engine.
            weight_backend: how weights will come, one of `rlhf_ray.weights.sync.Backend`.
            version: as in `TokenGenerator`.
            kv_on_update: what becomes of the KV cache of answers that are under way when weights change; None
                where none ever are.
            sleeps: whether it will be asked to `rest`.
        """
        super().__init__(max_model_len, version)
        os.environ.update(ENVIRONMENT)
        torch.set_num_threads(threads)
        self._eos_ids = list(read_eos_ids(model_folder))
        self._is_broken = False
        self._kv_on_update = kv_on_update
        self._num_updates = 0
        self._asked: dict[str, Ask] = {}
        self._asleep: set[str] = set()
        # A step that is still under way when weights change would be stamped with a version that is not its
        # own.
        options = {} if kv_on_update is None else {"async_scheduling": False}
        if sleeps and on_gpu():
            options["enable_sleep_mode"] = True
        self._llm = _build(model_folder, section, max_model_len, seed, weight_backend, options)
        self._stamp(version)

    def token_logprobs(self, sequences: Ragged) -> Ragged:
        outputs = self._run([row.tolist() for row in sequences], [_scoring_params()] * len(sequences))
        return Ragged.from_rows([_to_logprobs(output) for output in outputs], np.float32)

    def add(self, key: str, request: Ask) -> None:
        from vllm import TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=list(request.token_ids))
        if self._kv_on_update == "keep":
            # What earlier weights left in the prefix cache stays with those who had it.
            prompt["cache_salt"] = str(self._num_updates)
        params = _scoring_params()
        if request.request is not None and request.sampling is not None:
            params = self._sampling_params(request.request, request.sampling)
        self._asked[key] = request
        self._llm.llm_engine.add_request(key, prompt, params)

    def step(self) -> list[tuple[str, Sample | Array]]:
        done: list[tuple[str, Sample | Array]] = []
        for output in self._llm.llm_engine.step():
            assert _is_whole(output)
            asked = self._asked.pop(output.request_id)
            answer = _to_logprobs(output) if asked.request is None else _to_sample(asked.request, output)
            done.append((output.request_id, answer))
        return done

    def abort(self, keys: Sequence[str]) -> None:
        self._llm.llm_engine.abort_request(list(keys))
        for key in keys:
            del self._asked[key]

    def rest(self) -> None:
        """Weights move to main memory; what is cached is dropped. On a CPU vLLM only says that it did."""
        self._llm.sleep(level=1)
        self._asleep = set(MEMORY)

    def wake(self, weights_only: bool = False) -> None:
        tags = [tag for tag in MEMORY if tag in self._asleep and (tag == "weights" or not weights_only)]
        if tags:
            self._llm.wake_up(tags)
        self._asleep -= set(tags)

    def init_weight_transfer_engine(self, init_info: dict[str, object]) -> None:
        self._on_workers("init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        """From here to `finish_weight_update` the engine holds neither the old weights nor the new ones."""
        self._stamp(UNKNOWN_VERSION)
        self._num_updates += 1
        self._on_workers("start_weight_update")

    def update_weights(self, update_info: dict[str, object]) -> None:
        self._on_workers("update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str) -> None:
        """Make the received weights current: what was cached under the old ones is dropped, or nobody who
        comes later sees it."""
        self._on_workers("finish_weight_update")
        drops_running = self._kv_on_update == "drop"
        if self._kv_on_update != "keep" and not self._llm.reset_prefix_cache(drops_running):
            raise WeightSyncError(
                "the engine's prefix cache is in use and keeps values of the earlier weights"
            )
        self._stamp(int(weight_version))

    def _stamp(self, version: int) -> None:
        self._version = version
        self._llm.llm_engine.set_weight_version(str(version))

    def _on_workers(self, method: str, **arguments: object) -> None:
        if self._is_broken:
            raise WeightSyncError(f"{method}: an earlier weight update of this engine failed; start it anew")
        try:
            self._llm.collective_rpc(method, kwargs=arguments)
        except BaseException:
            # Layers that were taken apart for loading cannot be put together again without their weights.
            # Joining takes nothing apart and may be tried again.
            self._is_broken = method != "init_weight_transfer_engine"
            raise

    def _sample(self, requests: Sequence[Request], sampling: SamplingSpec) -> list[Sample]:
        params = [self._sampling_params(request, sampling) for request in requests]
        outputs = self._run([list(request.token_ids) for request in requests], params)
        return [_to_sample(request, output) for request, output in zip(requests, outputs, strict=True)]

    def _sampling_params(self, request: Request, sampling: SamplingSpec) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        length = sampling.fixed_length(request.prompt_id, request.sample_id)
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=request.seed,
            max_tokens=sampling.max_completion_length if length is None else length,
            min_tokens=sampling.min_completion_length if length is None else 0,
            stop_token_ids=self._eos_ids if length is None else [],
            ignore_eos=length is not None,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        from vllm import TokensPrompt

        tokens = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        return self._llm.generate(tokens, params, use_tqdm=False)


def _build(
    model_folder: str,
    section: EngineSection,
    max_model_len: int,
    seed: int,
    weight_backend: str,
    options: dict[str, Any],
) -> LLM:
    # A launcher that is not installed as a package has no entry point for vLLM to find the backend by.
    from rlhf_ray.weights import plugin

    plugin.register()
    from vllm import LLM

    arguments = engine_arguments(model_folder, section, max_model_len, seed, weight_backend)
    return LLM(**arguments, **options)


def engine_arguments(
    model_folder: str, section: EngineSection, max_model_len: int, seed: int, weight_backend: str
) -> dict[str, Any]:
    """What `vllm.LLM` is built with on this machine, to generate."""
    return {
        **shared_arguments(model_folder, section, max_model_len, seed),
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": {"backend": weight_backend},
    }


def shared_arguments(
    model_folder: str, section: EngineSection, max_model_len: int, seed: int
) -> dict[str, Any]:
    """Those of every engine, whatever it is for."""
    device_options: dict[str, Any] = {"gpu_memory_utilization": section.gpu_memory_utilization}
    if spans_bundles():
        device_options["distributed_executor_backend"] = "ray"
    if not on_gpu():
        device_options = {
            "kv_cache_memory_bytes": int(section.cpu_kv_cache_gib * 2**30),
            # vLLM winds a seeded request's random generator back after each piece of a prompt, which the
            # CPU's generator cannot do; so prompts are taken whole, and a batch must have room for the
            # longest.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, max_model_len),
            "block_size": CPU_BLOCK_TOKENS,
        }
    return {
        "model": model_folder,
        "skip_tokenizer_init": True,
        "load_format": "safetensors",  # never a pickle
        "dtype": section.number_format,
        "tensor_parallel_size": section.tensor_parallel_size,
        "max_model_len": max_model_len,
        "max_num_seqs": section.max_num_seqs,
        "enforce_eager": not on_gpu(),
        "seed": seed,
        "disable_log_stats": True,
        **device_options,
    }


def spans_bundles() -> bool:
    """Whether the workers are actors in bundles of their own, which the environment names."""
    return "VLLM_RAY_BUNDLE_INDICES" in os.environ


def on_gpu() -> bool:
    """Of an engine that spans bundles, the workers have the GPUs, and this process has none."""
    return spans_bundles() or torch.cuda.is_available()


def _is_whole(output: RequestOutput | PoolingRequestOutput[Any]) -> TypeGuard[RequestOutput]:
    return output.finished  # asked for are whole answers, and text alone


def _scoring_params() -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _to_logprobs(output: RequestOutput) -> Array:
    """Of the tokens given, after the first."""
    from vllm.logprobs import FlatLogprobs

    # An entry a position, each with the token itself first; none at the first position.
    flat = output.prompt_logprobs
    assert isinstance(flat, FlatLogprobs)
    logprobs = np.array([flat.logprobs[start] for start in flat.start_indices[1:]], dtype=np.float32)
    assert output.prompt_token_ids is not None
    assert len(logprobs) == len(output.prompt_token_ids) - 1, "one log-prob a token after the first"
    return logprobs


def _to_sample(request: Request, output: RequestOutput) -> Sample:
    from vllm.logprobs import FlatLogprobs

    completion = output.outputs[0]
    if completion.finish_reason not in ("stop", "length"):
        raise GenerationError(f"{request}: the engine ended it with {completion.finish_reason!r}")
    flat = completion.logprobs
    assert isinstance(flat, FlatLogprobs)
    spans = completion.weight_versions or ()
    versions = [int(span.version) for span in spans for _ in range(span.start, span.end)]
    return Sample(
        token_ids=list(completion.token_ids),
        logprobs=[flat.logprobs[start] for start in flat.start_indices],
        versions=versions,
        finished=completion.finish_reason == "stop",
    )
