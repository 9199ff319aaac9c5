"""What the loops ask of the roles.

A loop never knows whether a role is an object beside it or actors on a cluster.

Calls that do work return a `Pending` at once: a handle to a value that may still be in the making, on another
machine. A pending value can be handed to another role as an argument, so token arrays go from actor to actor
and the driver that runs the loop sees only handles and small reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from rlhf_ray.reporting.evaluation import EvalRecord
from rlhf_ray.types import (
    LabelledAnswers,
    Metrics,
    PairBatch,
    Prompts,
    Ragged,
    ReferencedPairs,
    RLBatch,
    Rollouts,
    SamplingSpec,
    Scores,
    SFTBatch,
    StepInfo,
    TwoAnswers,
)

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")
PairsT_contra = TypeVar("PairsT_contra", bound=PairBatch, contravariant=True)
Referenced = TypeVar("Referenced", bound=TwoAnswers)


class Pending(Protocol[T_co]):
    def result(self) -> T_co:
        """Wait for the value.

        Raises:
            RlhfRayError: that of the role that failed; `WorkerError` after the deadline.
        """
        ...


@dataclass(frozen=True)
class Done(Generic[T]):
    """A `Pending` that is already there: roles in the same process, and tests."""

    value: T

    def result(self) -> T:
        return self.value


class Generator(Protocol):
    """One or more generation engines."""

    @property
    def streams(self) -> bool:
        """Whether it takes new weights, and other prompts, while it answers."""
        ...

    def generate(self, prompts: Prompts, sampling: SamplingSpec, seed: int) -> Sequence[Pending[Rollouts]]:
        """Sample; one chunk an engine, or, if it streams, one a prompt, in the order of the prompts. Equal
        seeds give equal samples from equal weights."""
        ...


class StreamingGenerator(Generator, Protocol):
    """Engines whose answers arrive prompt by prompt."""

    def first_done(self, chunks: Sequence[Pending[Rollouts]], count: int) -> Sequence[int]:
        """Wait until so many of the chunks are there; which, the first in the sequence if there are more."""
        ...

    def give_up(self, chunks: Sequence[Pending[Rollouts]]) -> None:
        """Nobody wants these answers any more."""
        ...


class LogprobEngine(Protocol):
    """One or more engines that say how likely given tokens are."""

    def token_logprobs(self, sequences: Ragged) -> Sequence[Pending[Ragged]]:
        """Log-probs of each row's tokens after its first, at temperature 1; one chunk an engine, in order."""
        ...


class Scorer(Protocol):
    """The reward sources."""

    def score(self, rollouts: Pending[Rollouts]) -> Pending[Scores]: ...


class Reference(Protocol):
    """The frozen model that KL is measured against."""

    def logprobs(self, rollouts: Pending[Rollouts], temperature: float) -> Pending[Ragged]: ...


class Trained(Protocol):
    """A model that is being trained, over any number of ranks."""

    def save_model(self, folder: Path) -> Pending[None]:
        """Write a Hugging Face folder: safetensors, tokenizer, chat template."""
        ...

    def save_state(self, folder: Path) -> Pending[None]:
        """Write weights, optimizer, schedule and RNG of every rank."""
        ...

    def load_state(self, folder: Path) -> Pending[None]: ...


class Policy(Trained, Protocol):
    def logprobs(self, chunks: Sequence[Pending[Rollouts]]) -> Pending[Ragged]:
        """Log-probs of all chunks' responses, concatenated, under the current weights."""
        ...

    def train_rl(self, batch: Pending[RLBatch], step: int, kl_coef: float) -> Pending[Metrics]: ...

    def train_sft(self, batch: Pending[SFTBatch]) -> Pending[Metrics]: ...

    def evaluate_sft(self, batch: Pending[SFTBatch]) -> Pending[Metrics]: ...

    def publish(self, version: int, verify: bool) -> Metrics:
        """Send the weights to every engine, stamp them with `version`, and, if asked, compare log-probs.

        Raises:
            WeightSyncError: an engine does not hold what was sent.
        """
        ...


class Critic(Trained, Protocol):
    def values(self, chunks: Sequence[Pending[Rollouts]]) -> Pending[Ragged]: ...

    def train_rl(self, batch: Pending[RLBatch], step: int) -> Pending[Metrics]: ...


class PairScorer(Protocol[PairsT_contra]):
    def score_pairs(self, batch: Pending[PairsT_contra]) -> Pending[tuple[Ragged, Ragged]]:
        """Scores of chosen and rejected, one value a row."""
        ...


class RewardTrainer(Trained, PairScorer[PairBatch], Protocol):
    def train_pairs(self, batch: Pending[PairBatch]) -> Pending[Metrics]: ...


class PreferenceReference(Protocol):
    """The frozen model that preference optimisation stays near."""

    def answer(self, batch: Pending[Referenced]) -> Pending[Referenced]:
        """The batch with the log-probs of its answers filled in."""
        ...


class PreferenceTrainer(Trained, PairScorer[ReferencedPairs], Protocol):
    def train_pairs(self, batch: Pending[ReferencedPairs]) -> Pending[Metrics]: ...

    def train_answers(self, batch: Pending[LabelledAnswers]) -> Pending[Metrics]: ...

    def score_answers(self, batch: Pending[LabelledAnswers]) -> Pending[Ragged]:
        """Implicit rewards, one value a row."""
        ...


@dataclass(frozen=True)
class ScoredChunk:
    """Rollouts, and what the frozen models say of them.

    Fields:
        ref_logprobs: None where there is no reference.
    """

    rollouts: Pending[Rollouts]
    scores: Pending[Scores]
    ref_logprobs: Pending[Ragged] | None


class Experience(Protocol):
    """Turns scored rollouts into a training batch: reward shaping, advantages, returns; keeps the lineage."""

    def prepare(
        self,
        info: StepInfo,
        chunks: Sequence[ScoredChunk],
        old_logprobs: Pending[Ragged] | None,
        values: Pending[Ragged] | None,
        greedy: Sequence[ScoredChunk] = (),
    ) -> tuple[Pending[RLBatch], Pending[Metrics]]:
        """
        Args:
            old_logprobs: of all chunks, by the policy before the update; None takes the sampler's.
            values: by the critic; None where there is none.
            greedy: the greedy answers to the same prompts, for algorithms that compare with them.

        Raises:
            WeightSyncError: a token was sampled by other weights than those of `info.version`, or of the
                `max_lag` versions before it.
        """
        ...

    def gather(self, chunks: Sequence[Pending[Rollouts]]) -> Pending[Rollouts]:
        """All in one, in the order of the prompts' ids."""
        ...

    def num_informative(self, chunk: ScoredChunk) -> Pending[int]:
        """Prompts of the chunk whose answers did not all get the same reward."""
        ...

    def select(
        self, chunks: Sequence[ScoredChunk], num_prompts: int
    ) -> tuple[Pending[Rollouts], Pending[Scores]]:
        """The answers to so many of the prompts, those that say something first."""
        ...

    def evaluate(
        self, chunks: Sequence[ScoredChunk], logprobs: Pending[Ragged] | None
    ) -> Pending[list[EvalRecord]]:
        """Judge answers to held-out prompts. logprobs: by the policy; None where there is no reference."""
        ...

    def state_dict(self) -> Pending[dict[str, float]]: ...

    def load_state_dict(self, state: dict[str, float]) -> Pending[None]: ...
