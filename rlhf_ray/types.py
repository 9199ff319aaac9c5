"""The data that moves between roles. Frozen, typed, picklable, numpy only.

Token data is ragged: a batch of B sequences is one flat array of values and B + 1 offsets (`Ragged`), never a
padded rectangle, so masks come from lengths and cannot come from comparing token ids. numpy arrays pass
through Ray's object store without a copy, and read-only: nothing here is modified in place.

Letters in field comments: B sequences, T tokens of all sequences together, R response tokens of all
sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
Message = dict[str, str]
"""One turn of a conversation: `{"role": ..., "content": ...}`."""


@dataclass(frozen=True)
class Ragged:
    """B rows of different lengths in one flat array.

    Fields:
        values: [sum of lengths]
        offsets: [B + 1] int64, `offsets[0] == 0`; row i is `values[offsets[i]:offsets[i + 1]]`.
    """

    values: Array
    offsets: NDArray[np.int64]

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[float] | Array], dtype: type[np.generic]) -> Self:
        arrays = [np.asarray(row, dtype=dtype) for row in rows]
        values = np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)
        return cls(values.astype(dtype, copy=False), offsets_of([len(row) for row in arrays]))

    @classmethod
    def from_lengths(cls, values: Array, lengths: Sequence[int] | NDArray[np.int64]) -> Self:
        offsets = offsets_of(lengths)
        if offsets[-1] != len(values):
            raise ValueError(f"lengths sum to {offsets[-1]}, but there are {len(values)} values")
        return cls(values, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Array:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[Array]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def row_ids(self) -> NDArray[np.int64]:
        """[sum of lengths] the row that each value belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def masked(self, keep: NDArray[np.bool_]) -> Ragged:
        """The values [sum of lengths] where `keep` is True; rows become shorter, perhaps empty."""
        kept = np.bincount(self.row_ids[keep], minlength=len(self))
        return Ragged.from_lengths(self.values[keep], kept)

    def with_values(self, values: Array) -> Ragged:
        """The same rows with other values of the same total length."""
        return Ragged.from_lengths(values, self.lengths)

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> Ragged:
        return Ragged.from_rows([self[int(row)] for row in rows], self.values.dtype.type)

    @staticmethod
    def concat(parts: Sequence[Ragged]) -> Ragged:
        lengths = np.concatenate([part.lengths for part in parts])
        return Ragged.from_lengths(np.concatenate([part.values for part in parts]), lengths)

    @staticmethod
    def join(left: Ragged, right: Ragged) -> Ragged:
        """Row by row, left followed by right (a prompt and its response)."""
        return Ragged.from_rows(
            [np.concatenate([a, b]) for a, b in zip(left, right, strict=True)], left.values.dtype.type
        )


def offsets_of(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)


class Rows:
    """Mixin for frozen dataclasses with one entry a row in every field: a `Ragged`, an array or a tuple."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))  # type: ignore[arg-type]

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> Self:
        """The given rows, in the given order."""
        columns = {f.name: _select(getattr(self, f.name), rows) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **columns)  # type: ignore[type-var]

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: _concat([getattr(part, name) for part in parts]) for name in names})


def _select(column: Ragged | Array | tuple[object, ...], rows: Sequence[int] | NDArray[np.int64]) -> object:
    if isinstance(column, tuple):
        return tuple(column[int(row)] for row in rows)
    if isinstance(column, Ragged):
        return column.select(rows)
    return column[np.asarray(rows, dtype=np.int64)]


def _concat(columns: Sequence[Ragged] | Sequence[Array] | Sequence[tuple[object, ...]]) -> object:
    if isinstance(columns[0], Ragged):
        return Ragged.concat(columns)  # type: ignore[arg-type]
    if isinstance(columns[0], tuple):
        return tuple(entry for column in columns for entry in column)
    return np.concatenate(columns)  # type: ignore[arg-type]


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
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    num_generations: int = 1
    min_completion_length: int = 0


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
        parts: name of each source -> [B] float32, unweighted. Sources of weight 0 are watched, not trained
            on.
    """

    total: NDArray[np.float32]
    parts: dict[str, NDArray[np.float32]]

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> Scores:
        return Scores(self.total[rows], {name: part[rows] for name, part in self.parts.items()})

    @staticmethod
    def concat(chunks: Sequence[Scores]) -> Scores:
        parts = {name: np.concatenate([c.parts[name] for c in chunks]) for name in chunks[0].parts}
        return Scores(np.concatenate([c.total for c in chunks]), parts)


@dataclass(frozen=True)
class StepInfo:
    """Of a step of reinforcement learning.

    Fields:
        version: of the weights that sampled its tokens. kl_coef: this step's coefficient.
    """

    step: int
    version: int
    kl_coef: float


@dataclass(frozen=True)
class SFTBatch(Rows):
    """Fields: tokens: B rows int32; is_target: B rows bool, True where the token is to be predicted."""

    tokens: Ragged
    is_target: Ragged


@dataclass(frozen=True)
class PairBatch(Rows):
    """Preference pairs. `chosen` and `rejected` are whole sequences that share the prompt.

    Fields:
        prompt_lengths: [B] int64, number of leading prompt tokens in both.
        chosen, rejected: B rows int32, prompt and response.
        margin: [B] float32, how much better the chosen answer is said to be (0 where nothing is known).
    """

    prompt_lengths: NDArray[np.int64]
    chosen: Ragged
    rejected: Ragged
    margin: NDArray[np.float32]


@dataclass(frozen=True)
class JudgedPair:
    """Two answers to one prompt and who preferred which.

    Fields:
        answers: the two texts. votes: annotator -> index of the preferred answer.
        gold: annotator -> the two gold rewards it judged by (empty for people).
    """

    prompt_id: int
    messages: tuple[Message, ...]
    answers: tuple[str, str]
    votes: dict[str, int]
    gold: dict[str, tuple[float, float]]

    @property
    def lead(self) -> float:
        """Share of votes for answer 1 minus that for answer 0, -1 to 1; 0 is a draw."""
        return 2 * sum(self.votes.values()) / len(self.votes) - 1

    @property
    def preferred(self) -> int | None:
        """The answer with more votes; None in a draw."""
        return None if self.lead == 0 else int(self.lead > 0)


@dataclass(frozen=True)
class RLBatch(Rows):
    """One batch of rollouts, ready to train on. All per-token columns have one entry a response token (R in
    all).

    Fields:
        prompt_ids: [B] the group of each row.
        prompts, responses: B rows int32.
        old_logprobs: B rows float32, by the trainer before the first update on this batch; by the sampler
            where they are not recomputed.
        ref_logprobs: B rows float32, by the frozen reference (the old ones where there is none).
        values: B rows float32, by the critic before the update (0 where there is no critic).
        advantages, returns: B rows float32.
        importance_weights: B rows float32, of the off-policy correction; 1 where there is none.
        is_trained: B rows bool, False where a token is excluded from the loss.
    """

    prompt_ids: NDArray[np.int64]
    prompts: Ragged
    responses: Ragged
    old_logprobs: Ragged
    ref_logprobs: Ragged
    values: Ragged
    advantages: Ragged
    returns: Ragged
    importance_weights: Ragged
    is_trained: Ragged


Metrics = dict[str, float]
"""Names of METRICS as in the documentation (`policy/loss`, `kl/mean`, ...) -> value."""
