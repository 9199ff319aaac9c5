"""Frozen models in vLLM engines of their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.schema import EngineSection, ModelSection
from rlhf_ray.engines.vllm_generator import VLLMGenerator
from rlhf_ray.engines.vllm_scorer import VLLMScorer
from rlhf_ray.errors import ConfigError, ModelError
from rlhf_ray.models.loading import has_scalar_head, load_tokenizer, max_model_length, reads_alike
from rlhf_ray.types import Ragged
from rlhf_ray.workers.frozen import Reference

OTHER_WORDS = 4
"""Times as many tokens as the policy's tokenizer makes of a text, that another one is given room for."""


class ServedModel:
    """A language model in an engine, where nothing but its log-probs of given tokens is asked for.

    Args:
        longest: tokens of the longest row. threads, sleeps: as in `VLLMGenerator`.
    """

    def __init__(
        self, model_folder: str, section: EngineSection, longest: int, threads: int, sleeps: bool
    ) -> None:
        # vLLM samples a token behind those that it is asked about.
        self.engine = VLLMGenerator(
            model_folder, section, longest + 1, threads=threads, seed=0, version=0, sleeps=sleeps
        )

    def forward_all(
        self,
        sequences: Ragged,
        is_source: NDArray[np.bool_],
        prompts: Ragged | None = None,
        *,
        temperature: float,
    ) -> Ragged:
        """
        Raises:
            ConfigError: another temperature than 1.
        """
        if temperature != 1.0:
            raise ConfigError(
                f"placement.reference.backend=vllm: it gives log-probs of given tokens at temperature 1 "
                f"alone, and online.temperature is {temperature:g}; use backend: torch"
            )
        if not len(sequences):
            return sequences.with_values(np.empty(0, dtype=np.float32))
        # All tokens but a row's first; so the selection leaves out each row's last position, which predicts
        # nothing.
        logprobs = self.engine.token_logprobs(sequences)
        return logprobs.masked(np.delete(is_source, sequences.offsets[1:] - 1))

    def rest(self) -> None:
        self.engine.rest()

    def wake(self) -> None:
        self.engine.wake()


class ServedReference(Reference):
    """One engine. Args: as of `ServedModel`."""

    def __init__(
        self, model_folder: str, section: EngineSection, longest: int, threads: int, sleeps: bool = False
    ) -> None:
        super().__init__(ServedModel(model_folder, section, longest, threads, sleeps))


@dataclass(frozen=True)
class RewardEngine:
    """What serves the reward model of a stage.

    Fields:
        longest: tokens of the longest prompt and answer. sleeps: as in `VLLMGenerator`.
    """

    section: EngineSection
    longest: int
    sleeps: bool = False

    def start(self, model: ModelSection, policy: ModelSection, threads: int) -> VLLMScorer:
        """
        Raises:
            ModelError: it is no reward model that vLLM can serve.
        """
        if not has_scalar_head(model):
            raise ModelError(
                f"model.path={model.path}: has no head that gives a score, and vLLM makes none; name a "
                "reward model"
            )
        # An answer that was cut gets an EOS.
        room = self.longest + 1
        if not reads_alike(load_tokenizer(policy), load_tokenizer(model)):
            room *= OTHER_WORDS
        length = min(room, max_model_length(model))
        return VLLMScorer(model.path, self.section, length, threads=threads, sleeps=self.sleeps)
