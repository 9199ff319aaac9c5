"""The data that moves between roles. Frozen, typed, picklable, numpy only.

Token data is ragged: a batch of B sequences is one flat array of values and B + 1 offsets (`Ragged`), never a
padded rectangle, so masks come from lengths and cannot come from comparing token ids. numpy arrays pass
through Ray's object store without a copy, and read-only: nothing here is modified in place.

Letters in field comments: B sequences, T tokens of all sequences together, R response tokens of all
sequences.
"""

from rlhf_ray.types.batches import (
    JudgedPair,
    Judgement,
    LabelledAnswers,
    PairBatch,
    ReferencedPairs,
    RLBatch,
    SFTBatch,
    TwoAnswers,
)
from rlhf_ray.types.ragged import Array, Message, Metrics, Ragged, Rows, offsets_of
from rlhf_ray.types.rollouts import Prompts, Rollouts, SamplingSpec, Scores, StepInfo

__all__ = [
    "Array",
    "JudgedPair",
    "Judgement",
    "LabelledAnswers",
    "Message",
    "Metrics",
    "PairBatch",
    "Prompts",
    "RLBatch",
    "Ragged",
    "ReferencedPairs",
    "Rollouts",
    "Rows",
    "SFTBatch",
    "SamplingSpec",
    "Scores",
    "StepInfo",
    "TwoAnswers",
    "offsets_of",
]
