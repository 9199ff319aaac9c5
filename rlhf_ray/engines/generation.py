"""What all generation engines share: requests with their own seeds, checks, and the assembly of rollouts."""

from __future__ import annotations

import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.errors import GenerationError, ModelError, WeightSyncError
from rlhf_ray.types import Array, Prompts, Ragged, Rollouts, SamplingSpec

UNKNOWN_VERSION = -1


@dataclass(frozen=True)
class Request:
    """One response to sample. `seed` depends only on the run's seed, the prompt's id, the sample's and the
    turn."""

    prompt_id: int
    sample_id: int
    token_ids: tuple[int, ...]
    seed: int

    def __str__(self) -> str:
        return f"sample {self.sample_id} of prompt {self.prompt_id}"


@dataclass(frozen=True)
class Sample:
    """One sampled response: per-token columns of equal length, EOS included, as in `Rollouts`."""

    token_ids: Sequence[int] | NDArray[np.int64]
    logprobs: Sequence[float] | NDArray[np.float32]
    versions: Sequence[int]
    finished: bool


@dataclass(frozen=True)
class Ask:
    """Of an engine that steps.

    Fields:
        token_ids: to continue, or, without a request, to say how likely they are.
    """

    token_ids: tuple[int, ...]
    request: Request | None = None
    sampling: SamplingSpec | None = None


class TokenGenerator(ABC):
    """An engine that samples token ids and stamps every token with the version of its weights.

    A subclass samples (`_sample`) and scores (`token_logprobs`); versions, checks and assembly are here.
    """

    def __init__(self, max_model_len: int, version: int) -> None:
        """
        Args:
            max_model_len: tokens of prompt and response together.
            version: of the weights that the engine has loaded. -1 if they are a placeholder until the trainer
                publishes: generating before is an error.
        """
        self._max_model_len = max_model_len
        self._version = version

    def generate(self, prompts: Prompts, sampling: SamplingSpec, seed: int) -> Rollouts:
        """Sample `sampling.num_generations` responses to each prompt, in the order of prompts, then samples.

        Log-probs are those of the distribution that was sampled from: scaled by the temperature, restricted
        to the nucleus when `top_p < 1`, and without EOS before `min_completion_length`. At temperature 0 the
        most likely token is taken and its log-prob is that of temperature 1.

        Raises:
            WeightSyncError: the version of the weights is unknown.
            GenerationError: a prompt is too long, or a response is empty or has a log-prob that is not
                finite.
        """
        requests = make_requests(prompts, sampling.num_generations, seed)
        samples = self.sample(requests, sampling)
        return assemble_rollouts(prompts, sampling.num_generations, samples)

    def sample(self, requests: Sequence[Request], sampling: SamplingSpec) -> list[Sample]:
        """One sample a request, in the order of the requests; `num_generations` does not matter.

        Raises: as `generate`.
        """
        if self._version == UNKNOWN_VERSION:
            raise WeightSyncError(
                "the engine was asked to generate before the trainer published weights to it"
            )
        self.check_lengths(requests, sampling)
        samples = self._sample(requests, sampling)
        check_samples(requests, samples)
        return samples

    def check_lengths(self, requests: Sequence[Request], sampling: SamplingSpec) -> None:
        """
        Raises:
            GenerationError: a prompt is too long.
        """
        for request in requests:
            needed = len(request.token_ids) + sampling.max_completion_length
            if needed > self._max_model_len:
                raise GenerationError(
                    f"prompt {request.prompt_id}: {len(request.token_ids)} tokens and "
                    f"{sampling.max_completion_length} of the response do not fit into the engine's "
                    f"{self._max_model_len}"
                )

    @abstractmethod
    def rest(self) -> None:
        """Give the device to others: nothing may be asked before `wake`."""

    @abstractmethod
    def wake(self, weights_only: bool = False) -> None:
        """
        Args:
            weights_only: to receive weights, and not yet to generate.
        """

    @property
    def version(self) -> int:
        """Of the weights."""
        return self._version

    @abstractmethod
    def token_logprobs(self, sequences: Ragged) -> Ragged:
        """Log-probs of given tokens at temperature 1.

        Args:
            sequences: B rows of int32 token ids, at least two each.

        Returns:
            B rows float32, one value a token after the first.
        """

    @abstractmethod
    def init_weight_transfer_engine(self, init_info: dict[str, object]) -> None:
        """Join the trainer's transfer group."""

    @abstractmethod
    def start_weight_update(self) -> None:
        """From here to `finish_weight_update` the engine holds neither the old weights nor the new ones."""

    @abstractmethod
    def update_weights(self, update_info: dict[str, object]) -> None:
        """Receive what is announced."""

    @abstractmethod
    def finish_weight_update(self, weight_version: str) -> None:
        """Make the received weights current: what was cached under the old ones is dropped."""

    @abstractmethod
    def _sample(self, requests: Sequence[Request], sampling: SamplingSpec) -> list[Sample]:
        """One sample a request, in the order of the requests."""


class SteppedGenerator(TokenGenerator):
    """An engine whose scheduler can be driven step by step, so that weights may change between two steps."""

    @abstractmethod
    def add(self, key: str, request: Ask) -> None: ...

    @abstractmethod
    def step(self) -> list[tuple[str, Sample | Array]]:
        """A forward pass of all requests; of those that are done, the key and a `Sample`, or the log-probs of
        the given tokens after the first."""

    @abstractmethod
    def abort(self, keys: Sequence[str]) -> None:
        """Give these requests up."""


def sample_seed(seed: int, prompt_id: int, sample_id: int, *turn: int) -> int:
    """A seed of 63 bits, the same in every process, on every machine and in every order of requests.

    Args:
        turn: number of the turn, from the second (1) on.
    """
    parts = (seed, prompt_id, sample_id, *turn)
    digest = blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_requests(prompts: Prompts, num_generations: int, seed: int) -> list[Request]:
    return [
        Request(
            int(prompt_id), sample_id, tuple(tokens.tolist()), sample_seed(seed, int(prompt_id), sample_id)
        )
        for prompt_id, tokens in zip(prompts.ids, prompts.token_ids, strict=True)
        for sample_id in range(num_generations)
    ]


def check_samples(requests: Sequence[Request], samples: Sequence[Sample]) -> None:
    """
    Raises:
        GenerationError: a response is empty, or one of its log-probs is not finite.
    """
    for request, sample in zip(requests, samples, strict=True):
        if not len(sample.token_ids):
            raise GenerationError(f"{request}: the response is empty")
        columns = {len(sample.token_ids), len(sample.logprobs), len(sample.versions)}
        assert len(columns) == 1, f"{request}: one log-prob and one version a token"
        if not np.isfinite(sample.logprobs).all():
            position = int(np.flatnonzero(~np.isfinite(sample.logprobs))[0])
            raise GenerationError(
                f"{request}: the log-prob of response token {position} (id {sample.token_ids[position]}) is "
                f"{sample.logprobs[position]}"
            )


def assemble_rollouts(prompts: Prompts, num_generations: int, samples: Sequence[Sample]) -> Rollouts:
    """The samples of all prompts, in the order of prompts, then samples."""
    rows: NDArray[np.int64] = np.repeat(np.arange(len(prompts)), num_generations)
    responses = Ragged.from_rows([sample.token_ids for sample in samples], np.int32)
    return Rollouts(
        prompt_ids=prompts.ids[rows],
        sample_ids=np.tile(np.arange(num_generations), len(prompts)),
        prompts=Ragged.from_rows([prompts.token_ids[int(row)] for row in rows], np.int32),
        responses=responses,
        logprobs=Ragged.from_rows([sample.logprobs for sample in samples], np.float32),
        versions=Ragged.from_rows([sample.versions for sample in samples], np.int32),
        is_sampled=responses.filled(np.True_),
        turn_rewards=responses.filled(np.float32(0)),
        finished=np.array([sample.finished for sample in samples], dtype=np.bool_),
        failures=(None,) * len(samples),
        columns=tuple(prompts.columns[int(row)] for row in rows),
        messages=tuple(prompts.messages[int(row)] for row in rows),
    )


def read_eos_ids(model_folder: str) -> tuple[int, ...]:
    """All ids that end a response: `eos_token_id` of generation_config.json, which may be a list.

    A folder without that file means, as in transformers, that config.json speaks for both.

    Raises:
        ModelError: there is no such id.
    """
    folder = Path(model_folder)
    path = folder / "generation_config.json"
    if not path.exists():
        path = folder / "config.json"
    ids = json.loads(path.read_text()).get("eos_token_id")
    if ids is None:
        raise ModelError(f"{path}: eos_token_id is missing, so no response would ever end; add the id or ids")
    return tuple(ids) if isinstance(ids, list) else (ids,)
