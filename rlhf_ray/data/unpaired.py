"""Single answers with a label, as unpaired preference optimisation takes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.encoding import Report
from rlhf_ray.data.formats import LabelledExample
from rlhf_ray.data.skipped import Skipped
from rlhf_ray.types import LabelledAnswers, PairBatch, Ragged


def encode_labelled(
    examples: Sequence[LabelledExample], formatter: ChatFormatter, max_length: int
) -> tuple[LabelledAnswers, Skipped]:
    """Answers of at most `max_length` tokens with their prompt, in the order of the examples that are kept.

    Raises:
        DataError: nothing is left.
    """
    report = Report("max_length", max_length)
    lengths: list[int] = []
    labels: list[bool] = []
    answers: list[list[int]] = []
    for example, prompt in report.with_prompts(examples, formatter):
        ids = prompt + formatter.completion_ids(example.completion)
        if not report.admits(example.id, len(ids), "prompt and answer are longer"):
            continue
        lengths.append(len(prompt))
        labels.append(example.is_desirable)
        answers.append(ids)
    skipped = report.finish(len(answers))
    batch = labelled_answers(
        np.asarray(lengths, dtype=np.int64),
        Ragged.from_rows(answers, np.int32),
        np.asarray(labels, dtype=np.bool_),
        max_length,
    )
    return batch, skipped


def unpaired(pairs: PairBatch, max_length: int) -> LabelledAnswers:
    """Two rows a pair: the chosen answer is desirable, the rejected one is not."""
    return labelled_answers(
        np.tile(pairs.prompt_lengths, 2),
        Ragged.concat([pairs.chosen, pairs.rejected]),
        np.repeat([True, False], len(pairs)),
        max_length,
    )


def labelled_answers(
    prompt_lengths: NDArray[np.int64], answers: Ragged, is_desirable: NDArray[np.bool_], max_length: int
) -> LabelledAnswers:
    """With each prompt's mismatched response beside it, and without a reference's log-probs yet."""
    nothing = np.zeros(len(answers), dtype=np.float32)
    mismatched = mismatch(prompt_lengths, answers, max_length)
    return LabelledAnswers(prompt_lengths, answers, is_desirable, mismatched, nothing, nothing)


def mismatch(prompt_lengths: NDArray[np.int64], answers: Ragged, max_length: int) -> Ragged:
    """Each prompt with the response of the next row, in a circle, whose prompt is another one.

    Fixed for the whole dataset, and not for each batch as in the paper, so that the reference's log-probs of
    these rows can be computed once; over a batch of shuffled rows the responses are as unrelated. A response
    that would exceed `max_length` is cut. Where all prompts are the same, it is any row's.
    """
    prompts = [row[:length] for row, length in zip(answers, prompt_lengths, strict=True)]
    keys = [prompt.tobytes() for prompt in prompts]
    count = len(keys)
    partner = [(row + 1) % count for row in range(count)]
    # Twice around from the end, since the last rows' partners may lie past the first ones.
    for row in [*reversed(range(count)), *reversed(range(count))]:
        if keys[partner[row]] == keys[row]:
            partner[row] = partner[(row + 1) % count]
    rows = [
        np.concatenate([prompts[row], answers[other][prompt_lengths[other] :]])[:max_length]
        for row, other in enumerate(partner)
    ]
    return Ragged.from_rows(rows, np.int32)
