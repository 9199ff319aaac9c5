"""Where the reference's log-probs come from: computed once and kept for a resumed run, or in every step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf_ray.reporting.files import written_aside
from rlhf_ray.roles import Done, Pending, PreferenceReference, PreferenceTrainer, Referenced
from rlhf_ray.types import LabelledAnswers, Metrics, ReferencedPairs

CHUNK_ROWS = 256
"""Rows of one call to the reference: its deadline must not depend on the size of the dataset."""


@dataclass(frozen=True)
class ReferenceCache:
    """A file a dataset, named by what its content depends on.

    Fields:
        reference: identity of the model, and of the way in which it computes.
    """

    folder: Path
    reference: str

    def read(self, batch: Referenced) -> Referenced | None:
        """The batch with its log-probs, if they were computed before."""
        path = self._path(batch)
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as kept:
            return batch.with_reference(kept["first"], kept["second"])

    def fill(self, batch: Referenced, reference: PreferenceReference) -> Referenced:
        """Compute and keep them."""
        cuts = np.arange(CHUNK_ROWS, len(batch), CHUNK_ROWS)
        chunks = [batch.select(rows) for rows in np.array_split(np.arange(len(batch)), cuts)]
        answered = type(batch).concat([reference.answer(Done(chunk)).result() for chunk in chunks])
        with written_aside(self._path(batch)) as aside, aside.open("wb") as file:
            first, second = answered.reference
            np.savez(file, first=first, second=second)
        return answered

    def _path(self, batch: Referenced) -> Path:
        digest = hashlib.sha256(self.reference.encode())
        digest.update(batch.prompt_lengths.tobytes())
        for side in batch.sides:
            digest.update(side.offsets.tobytes() + side.values.tobytes())
        return self.folder / f"{digest.hexdigest()[:32]}.npz"


@dataclass(frozen=True)
class AnsweredInEveryStep:
    """Training steps before which the reference answers; its log-probs go from actor to actor."""

    trainer: PreferenceTrainer
    reference: PreferenceReference

    def train_pairs(self, batch: Pending[ReferencedPairs]) -> Pending[Metrics]:
        return self.trainer.train_pairs(self.reference.answer(batch))

    def train_answers(self, batch: Pending[LabelledAnswers]) -> Pending[Metrics]:
        return self.trainer.train_answers(self.reference.answer(batch))
