"""The same generation by three means: engines as a run has them, bare vLLM, and Hugging Face `generate`.

The work is fixed to the token: prompts of random ids, answers whose lengths are given. Prompts are new at
every call, as they are to an engine whose weights have changed: nothing is found in the prefix cache but what
the answers to one prompt share.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors.group import ActorGroup
from actors.roles import RemoteGenerator
from launch.stages.context import StageContext
from launch.stages.generation import build_engines, demand_engine
from rlhf_ray.config.schema import EngineSection, ModelSection
from rlhf_ray.engines.generation import make_requests
from rlhf_ray.engines.vllm_generator import ENVIRONMENT, engine_arguments
from rlhf_ray.types import Prompts, Ragged, Rollouts, SamplingSpec


@dataclass(frozen=True)
class Work:
    """One batch of requests; each engine gets a share of the prompts."""

    prompts: Prompts
    sampling: SamplingSpec
    seed: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each answer, in the order of prompts, then samples."""
        lengths = [
            self.sampling.fixed_length(int(prompt), sample)
            for prompt in self.prompts.ids
            for sample in range(self.sampling.num_generations)
        ]
        return [length for length in lengths if length is not None]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def shares(self, num_engines: int) -> list[Work]:
        """As `RemoteGenerator` deals them out."""
        rows = np.array_split(np.arange(len(self.prompts)), num_engines)
        return [Work(self.prompts.select(part), self.sampling, self.seed) for part in rows if len(part)]


@dataclass(frozen=True)
class Answers:
    """Fields: seconds: from the requests to all answers. tokens: of each answer."""

    seconds: float
    tokens: list[list[int]]


@dataclass(frozen=True)
class Shape:
    """Of the work. lengths: of the answers, over and over. vocabulary: ids are drawn below it."""

    num_prompts: int
    num_generations: int
    prompt_lengths: Sequence[int]
    lengths: Sequence[int]
    vocabulary: int

    @property
    def max_model_len(self) -> int:
        return max(self.prompt_lengths) + max(self.lengths)

    def work(self, number: int) -> Work:
        """The work of call `number`: other tokens than at every other call, and as much of it."""
        generator = np.random.default_rng(number)
        lengths = np.resize(self.prompt_lengths, self.num_prompts)
        rows = [generator.integers(0, self.vocabulary, size=length) for length in lengths]
        prompts = Prompts(
            ids=np.arange(self.num_prompts),
            # About as long as the text of such a prompt: it travels with the answers.
            messages=tuple(({"role": "user", "content": "word " * int(length)},) for length in lengths),
            token_ids=Ragged.from_rows(rows, np.int32),
            columns=({},) * self.num_prompts,
        )
        sampling = SamplingSpec(
            max_completion_length=max(self.lengths),
            num_generations=self.num_generations,
            fixed_lengths=tuple(self.lengths),
        )
        return Work(prompts, sampling, seed=number)


@contextmanager
def our_engines(
    context: StageContext, model: ModelSection, max_model_len: int
) -> Iterator[tuple[ActorGroup, int]]:
    """The engines of a run, and the threads of each; what they sample is version 0."""
    with context.placement([demand_engine(context, model)]) as placement:
        group = placement.start("engine")
        build_engines(context, placement, group, model, max_model_len, version=0)
        placement.wait_until_built()
        yield group, placement.shares["engine"].threads


def generate_by_ours(group: ActorGroup, work: Work) -> Answers:
    """With every column of the rollouts in this process."""
    start = time.perf_counter()
    pending = RemoteGenerator(group).generate(work.prompts, work.sampling, work.seed)
    rollouts = Rollouts.concat([chunk.result() for chunk in pending])
    seconds = time.perf_counter() - start
    return Answers(seconds, [row.tolist() for row in rollouts.responses])


def thread_environment(threads: int) -> dict[str, str]:
    """Of a process of the baseline's. Its threads wait as ours do, unless the caller's environment says
    otherwise: threads that spin while they wait are ruinous on cores that somebody else uses too."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "TOKENIZERS_PARALLELISM": "false",
    }


class BareVLLM:
    """`vllm.LLM.generate` and nothing else, with the engine arguments and the environment of ours.

    That includes a scheduler in the engine's own process: both arms then batch alike, step for step, and
    answer alike, token for token.
    """

    environment = ENVIRONMENT

    def __init__(self, model: str, section: EngineSection, max_model_len: int, threads: int) -> None:
        torch.set_num_threads(threads)
        from vllm import LLM

        arguments = engine_arguments(model, section, max_model_len, 0, "gloo")
        del arguments["weight_transfer_config"]
        self._llm = LLM(**arguments)

    def generate(self, work: Work) -> Answers:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        requests = make_requests(work.prompts, work.sampling.num_generations, work.seed)
        prompts = [TokensPrompt(prompt_token_ids=list(request.token_ids)) for request in requests]
        params = [
            SamplingParams(
                temperature=work.sampling.temperature,
                seed=request.seed,
                max_tokens=length,
                ignore_eos=True,
                # Reinforcement needs the log-probs of what was sampled.
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for request, length in zip(requests, work.lengths, strict=True)
        ]
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return Answers(seconds, [list(output.outputs[0].token_ids) for output in outputs])


class HuggingFace:
    """`generate` of transformers: one batch, padded on the left, until its longest answer is done."""

    environment: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, model: str, section: EngineSection, max_model_len: int, threads: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, section.number_format))
        self._model = loaded.to(self._device).eval()
        self._model.generation_config = type(self._model.generation_config)()

    @torch.inference_mode()
    def generate(self, work: Work) -> Answers:
        requests = make_requests(work.prompts, work.sampling.num_generations, work.seed)
        width = max(len(request.token_ids) for request in requests)
        tokens = torch.zeros((len(requests), width), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, request in enumerate(requests):
            tokens[row, width - len(request.token_ids) :] = torch.tensor(request.token_ids)
            mask[row, width - len(request.token_ids) :] = 1
        torch.manual_seed(work.seed)
        start = time.perf_counter()
        output = self._model.generate(
            tokens.to(self._device),
            attention_mask=mask.to(self._device),
            do_sample=True,
            temperature=work.sampling.temperature,
            top_k=0,
            max_new_tokens=max(work.lengths),
            pad_token_id=0,
        )
        responses = output[:, width:].cpu()
        seconds = time.perf_counter() - start
        lengths = zip(responses.tolist(), work.lengths, strict=True)
        return Answers(seconds, [row[:length] for row, length in lengths])


SYSTEMS: dict[str, type[BareVLLM] | type[HuggingFace]] = {"vllm": BareVLLM, "transformers": HuggingFace}
"""What ours is compared with, by name."""
