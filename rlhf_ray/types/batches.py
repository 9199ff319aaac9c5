"""What models are trained on, and what people and models say of pairs of answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.types.ragged import Message, Ragged, Rows


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
        soft_label: [B] float32, probability that `chosen` is really the preferred one, 0.5 to 1.
    """

    prompt_lengths: NDArray[np.int64]
    chosen: Ragged
    rejected: Ragged
    margin: NDArray[np.float32]
    soft_label: NDArray[np.float32]


class TwoAnswers(Rows, ABC):
    """Mixin for batches with two answers a row, of which a reference gives the log-probs."""

    prompt_lengths: NDArray[np.int64]

    @property
    @abstractmethod
    def sides(self) -> tuple[Ragged, Ragged]:
        """B rows each, prompt and response."""

    @property
    @abstractmethod
    def reference(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of each side [B], log-prob of the whole response under the reference."""

    @abstractmethod
    def with_reference(self, first: NDArray[np.float32], second: NDArray[np.float32]) -> Self: ...


@dataclass(frozen=True)
class ReferencedPairs(PairBatch, TwoAnswers):
    """Pairs with what the reference says of them.

    Fields:
        ref_chosen, ref_rejected: [B] float32, log-prob of the whole answer (0 where there is no reference).
    """

    ref_chosen: NDArray[np.float32]
    ref_rejected: NDArray[np.float32]

    @property
    def sides(self) -> tuple[Ragged, Ragged]:
        return self.chosen, self.rejected

    @property
    def reference(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self.ref_chosen, self.ref_rejected

    def with_reference(self, first: NDArray[np.float32], second: NDArray[np.float32]) -> Self:
        return replace(self, ref_chosen=first, ref_rejected=second)


@dataclass(frozen=True)
class LabelledAnswers(TwoAnswers):
    """Single answers that people found good or bad, without a comparison.

    Fields:
        prompt_lengths: [B] int64, number of leading prompt tokens, in `answers` and in `mismatched`.
        answers: B rows int32, prompt and response.
        is_desirable: [B] bool.
        mismatched: B rows int32, each prompt with the response to another one.
        ref_answers, ref_mismatched: [B] float32, log-prob of the whole response under the reference.
    """

    prompt_lengths: NDArray[np.int64]
    answers: Ragged
    is_desirable: NDArray[np.bool_]
    mismatched: Ragged
    ref_answers: NDArray[np.float32]
    ref_mismatched: NDArray[np.float32]

    @property
    def sides(self) -> tuple[Ragged, Ragged]:
        return self.answers, self.mismatched

    @property
    def reference(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self.ref_answers, self.ref_mismatched

    def with_reference(self, first: NDArray[np.float32], second: NDArray[np.float32]) -> Self:
        return replace(self, ref_answers=first, ref_mismatched=second)


@dataclass(frozen=True)
class Judgement:
    """What a feedback model says of two answers by one principle.

    Fields:
        principle: its id.
        straight, swapped: P(the second answer is better), asked with the answers in their order, and with
            the second one shown first.
    """

    annotator: str
    principle: str
    straight: float
    swapped: float

    @property
    def probability(self) -> float:
        """P(the second answer is better), without what is owed to the place in which it was shown."""
        # Rounded, so that a model which looks at the place alone has no opinion at all, to the last bit.
        return round((self.straight + self.swapped) / 2, 12)

    @property
    def depends_on_order(self) -> bool:
        """The other answer wins when they are shown in the other order."""
        return (self.straight - 0.5) * (self.swapped - 0.5) < 0


@dataclass(frozen=True)
class JudgedPair:
    """Two answers to one prompt and who preferred which.

    Fields:
        answers: the two texts. votes: annotator -> index of the preferred answer.
        gold: annotator -> the two gold rewards it judged by (empty for people).
        probabilities: annotator -> P(answer 1 is better), of those who say more than a vote; one who is
            exactly undecided has a probability and no vote.
        judgements: what these probabilities are made of.
    """

    prompt_id: int
    messages: tuple[Message, ...]
    answers: tuple[str, str]
    votes: dict[str, int]
    gold: dict[str, tuple[float, float]]
    probabilities: dict[str, float] = field(default_factory=dict)
    judgements: tuple[Judgement, ...] = ()

    @property
    def lead(self) -> float:
        """P(answer 1 is better) minus P(answer 0 is better), -1 to 1, as the mean over annotators, a plain
        vote being certain; 0 is a draw, or a pair that nobody judged."""
        opinions = {**self.votes, **self.probabilities}
        return 2 * sum(opinions.values()) / len(opinions) - 1 if opinions else 0.0

    @property
    def preferred(self) -> int | None:
        """The answer that leads; None in a draw."""
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
