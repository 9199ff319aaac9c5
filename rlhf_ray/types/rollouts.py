"""From prompts to scored answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.types.ragged import Message, Metrics, Ragged, Rows


@dataclass(frozen=True)
class Prompts(Rows):
    """Prompts ready for generation.

    Fields:
        ids: [B] stable id of each prompt in its dataset; all samples of a prompt share it (their group).
        messages: [B] the conversation up to the answer.
        token_ids: B rows, int32, the rendered conversation with the generation prompt.
        columns: [B] the dataset's other columns, handed to reward functions.
    """

    ids: NDArray[np.int64]
    messages: tuple[tuple[Message, ...], ...]
    token_ids: Ragged
    columns: tuple[dict[str, object], ...]


@dataclass(frozen=True)
class SamplingSpec:
    """How the engine samples. `temperature` divides the logits in the sampler and in every later log-prob.

    `temperature=0` is greedy. `top_p` and `top_k` are for evaluation and data collection only: they bias the
    importance ratio, so the online stage has no key for them.

    Fields:
        fixed_lengths: for measurements, in which all have to do the same work: tokens of each answer, which
            no EOS ends before. Sample s of prompt p gets number p * num_generations + s, the list being
            repeated as often as needed.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    num_generations: int = 1
    min_completion_length: int = 0
    fixed_lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.fixed_lengths is None:
            return
        if not self.fixed_lengths or not 0 < min(self.fixed_lengths) <= max(self.fixed_lengths) <= (
            self.max_completion_length
        ):
            raise ValueError(
                f"fixed_lengths must be from 1 to max_completion_length={self.max_completion_length}"
            )

    def fixed_length(self, prompt_id: int, sample_id: int) -> int | None:
        """Tokens that the answer has to have; None where an EOS ends it."""
        if self.fixed_lengths is None:
            return None
        return self.fixed_lengths[(prompt_id * self.num_generations + sample_id) % len(self.fixed_lengths)]


@dataclass(frozen=True)
class Rollouts(Rows):
    """Sampled responses, as token ids: nothing is ever re-encoded from text.

    In an episode of several turns the response is everything after the prompt: answers, and between them what
    the environment said.

    Fields:
        prompt_ids: [B] id of the prompt (the group) of each sample.
        sample_ids: [B] 0 .. num_generations - 1 within the prompt.
        prompts: B rows, int32.
        responses: B rows, int32, with the EOS token that ended them, if one did.
        logprobs: B rows like responses, float32, of the sampled token under the sampler's own
            (temperature-scaled) distribution; 0 where the environment spoke.
        versions: B rows like responses, int32, version of the weights that sampled each token, or that
            listened.
        is_sampled: B rows like responses, bool, False where the environment spoke.
        turn_rewards: B rows like responses, float32: the environment's reward for a turn, at the last token
            of its answer; 0 elsewhere.
        finished: [B] bool, True where an EOS token ended the response, False where a length limit cut it.
        failures: [B] how the environment failed; None where it did not. Such a row teaches nothing.
        columns: [B] as in `Prompts`.
        messages: [B] as in `Prompts`.
    """

    prompt_ids: NDArray[np.int64]
    sample_ids: NDArray[np.int64]
    prompts: Ragged
    responses: Ragged
    logprobs: Ragged
    versions: Ragged
    is_sampled: Ragged
    turn_rewards: Ragged
    finished: NDArray[np.bool_]
    failures: tuple[str | None, ...]
    columns: tuple[dict[str, object], ...]
    messages: tuple[tuple[Message, ...], ...]

    @property
    def sequences(self) -> Ragged:
        """B rows, int32: prompt and response in one."""
        return Ragged.join(self.prompts, self.responses)

    @property
    def sampled(self) -> NDArray[np.bool_]:
        """[R] `is_sampled` of all responses together."""
        return self.is_sampled.values.astype(np.bool_, copy=False)


@dataclass(frozen=True)
class Scores:
    """What the reward sources say of a chunk of rollouts.

    Fields:
        total: [B] float32, the weighted sum that is trained on.
        parts: name of each source -> [B] float32, unweighted; NaN where it has nothing to say. Sources of
            weight 0 are watched, not trained on.
        is_valid: [B] bool, False where a source that is trained on failed: such a sample is not trained on.
            By default all are.
        spreads: name of a source -> [B] float32, how far its members are apart (standard deviation).
        events: metric's name -> how often it happened (`reward/<name>/failures`, `reward/<name>/retries`).
    """

    total: NDArray[np.float32]
    parts: dict[str, NDArray[np.float32]]
    is_valid: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=np.bool_))
    spreads: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    events: Metrics = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.is_valid):
            object.__setattr__(self, "is_valid", np.ones(len(self.total), dtype=np.bool_))

    @staticmethod
    def concat(chunks: Sequence[Scores]) -> Scores:
        """The samples of all chunks; events are added up."""
        first = chunks[0]
        return Scores(
            total=np.concatenate([chunk.total for chunk in chunks]),
            parts={name: np.concatenate([c.parts[name] for c in chunks]) for name in first.parts},
            is_valid=np.concatenate([chunk.is_valid for chunk in chunks]),
            spreads={name: np.concatenate([c.spreads[name] for c in chunks]) for name in first.spreads},
            events={name: sum(chunk.events[name] for chunk in chunks) for name in first.events},
        )

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> Scores:
        """The given rows; what happened while they were scored, happened to all."""
        return Scores(
            total=self.total[rows],
            parts={name: part[rows] for name, part in self.parts.items()},
            is_valid=self.is_valid[rows],
            spreads={name: spread[rows] for name, spread in self.spreads.items()},
            events=self.events,
        )


@dataclass(frozen=True)
class StepInfo:
    """Of a step of reinforcement learning.

    Fields:
        version: of the weights that are trained, which sampled its tokens, or older ones did.
        kl_coef: this step's coefficient.
    """

    step: int
    version: int
    kl_coef: float
