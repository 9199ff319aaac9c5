"""Which tokens of a batch are learned from: those that the policy sampled, in episodes that did not fail."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.types import Array, Ragged, RLBatch, Rollouts


@dataclass(frozen=True)
class SampledPart:
    """A batch without what an environment said. Everything between rollouts and training is computed on it,
    as if the answers of an episode stood one after the other, and is then put back into its place.

    Fields:
        rows: [b] int64, of the batch's B, ascending.
        keep: [R] bool, True at the tokens that stay.
    """

    rows: NDArray[np.int64]
    keep: NDArray[np.bool_]

    @classmethod
    def of(cls, rollouts: Rollouts, compared_with: Rollouts | None = None) -> SampledPart:
        """compared_with: answers to the same prompts; where they failed, there is nothing to compare with."""
        is_kept = did_not_fail(rollouts)
        if compared_with is not None:
            usable = compared_with.prompt_ids[did_not_fail(compared_with)]
            is_kept &= np.isin(rollouts.prompt_ids, usable)
        return cls(np.flatnonzero(is_kept), rollouts.sampled & is_kept[rollouts.is_sampled.row_ids])

    def tokens(self, column: Ragged) -> Ragged:
        """b rows of a column that has an entry a token of all B responses."""
        return column.masked(self.keep).select(self.rows)

    def rollouts(self, whole: Rollouts) -> Rollouts:
        return replace(
            whole.select(self.rows),
            responses=self.tokens(whole.responses),
            logprobs=self.tokens(whole.logprobs),
            versions=self.tokens(whole.versions),
            is_sampled=self.tokens(whole.is_sampled),
            turn_rewards=self.tokens(whole.turn_rewards),
        )

    def put_back(self, batch: RLBatch, whole: Rollouts) -> RLBatch:
        """A batch of this part's b rows as one of all B responses, in which nothing else is trained on."""

        def column(values: Array, fill: float) -> Ragged:
            placed = np.full(len(self.keep), fill, dtype=values.dtype)
            placed[self.keep] = values
            return whole.responses.with_values(placed)

        return RLBatch(
            prompt_ids=whole.prompt_ids,
            prompts=whole.prompts,
            responses=whole.responses,
            old_logprobs=column(batch.old_logprobs.values, 0.0),
            ref_logprobs=column(batch.ref_logprobs.values, 0.0),
            values=column(batch.values.values, 0.0),
            advantages=column(batch.advantages.values, 0.0),
            returns=column(batch.returns.values, 0.0),
            importance_weights=column(batch.importance_weights.values, 1.0),
            is_trained=column(batch.is_trained.values, False),
        )


def by_prompt(rollouts: Rollouts) -> Rollouts:
    """In the order of the prompts' ids, and of the answers to each."""
    return rollouts.select(np.lexsort((rollouts.sample_ids, rollouts.prompt_ids)))


def did_not_fail(rollouts: Rollouts) -> NDArray[np.bool_]:
    """[B]"""
    return np.array([failure is None for failure in rollouts.failures], dtype=np.bool_)


def num_turns(rollouts: Rollouts) -> NDArray[np.int64]:
    """[B] answers of each episode."""
    follows_answer = np.append(False, rollouts.sampled[:-1])
    follows_answer[rollouts.responses.offsets[:-1]] = False
    begins = rollouts.sampled & ~follows_answer
    return np.bincount(rollouts.responses.row_ids[begins], minlength=len(rollouts))
