"""Single answers with a label: from pairs, from rows, and each prompt's answer to another prompt."""

from __future__ import annotations

import numpy as np

from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.formats import LabelledExample
from rlhf_ray.data.unpaired import encode_labelled, mismatch, unpaired
from rlhf_ray.types import PairBatch, Ragged
from tests.tiny import tiny_tokenizer

FORMATTER = ChatFormatter(tiny_tokenizer(), [2])


def rows_of(ragged: Ragged) -> list[list[int]]:
    return [row.tolist() for row in ragged]


def mismatched(prompts: list[list[int]], responses: list[list[int]], max_length: int = 9) -> list[list[int]]:
    answers = Ragged.from_rows([[*p, *r] for p, r in zip(prompts, responses, strict=True)], np.int32)
    return rows_of(mismatch(np.array([len(p) for p in prompts]), answers, max_length))


def test_each_prompt_gets_the_next_answer_to_another_prompt() -> None:
    found = mismatched([[10], [11], [12, 13]], [[20, 2], [21, 2], [22, 2]])
    assert found == [[10, 21, 2], [11, 22, 2], [12, 13, 20, 2]]


def test_answers_to_the_same_prompt_are_passed_over() -> None:
    """In a circle, from the last rows past the first ones, whose prompt is the same."""
    found = mismatched([[10], [10], [11], [11], [10]], [[20], [21], [22], [23], [24]])
    assert found == [[10, 22], [10, 22], [11, 24], [11, 24], [10, 22]]


def test_prompts_that_begin_alike_are_different_prompts() -> None:
    assert mismatched([[10], [10, 20]], [[20, 2], [2]]) == [[10, 2], [10, 20, 20, 2]]


def test_one_prompt_alone_keeps_an_answer_of_its_own() -> None:
    found = mismatched([[10]] * 3, [[20], [21], [22]])
    assert {tuple(row) for row in found} <= {(10, 20), (10, 21), (10, 22)}


def test_what_would_be_too_long_is_cut() -> None:
    assert mismatched([[10, 11, 12], [13]], [[2], [20, 21, 22, 2]], max_length=5)[0] == [10, 11, 12, 20, 21]


def test_a_pair_becomes_two_answers() -> None:
    pairs = PairBatch(
        prompt_lengths=np.array([1, 2]),
        chosen=Ragged.from_rows([[10, 20, 2], [11, 12, 21, 2]], np.int32),
        rejected=Ragged.from_rows([[10, 30, 2], [11, 12, 2]], np.int32),
        margin=np.zeros(2, dtype=np.float32),
        soft_label=np.ones(2, dtype=np.float32),
    )
    batch = unpaired(pairs, max_length=9)
    assert rows_of(batch.answers) == [*rows_of(pairs.chosen), *rows_of(pairs.rejected)]
    assert batch.prompt_lengths.tolist() == [1, 2, 1, 2]
    assert batch.is_desirable.tolist() == [True, True, False, False]
    assert rows_of(batch.mismatched) == [[10, 21, 2], [11, 12, 30, 2], [10, 2], [11, 12, 20, 2]]


def test_rows_with_labels_are_written_as_every_stage_writes_them() -> None:
    question, other = (({"role": "user", "content": text},) for text in ("Why?", "Where is it?"))
    examples = [
        LabelledExample(0, question, "Because.", True),
        LabelledExample(4, other, "There. " * 40, True),
        LabelledExample(7, other, "There.", False),
    ]
    batch, skipped = encode_labelled(examples, FORMATTER, 40)
    prompts = [FORMATTER.prompt_ids(messages) for messages in (question, other)]
    responses = [FORMATTER.completion_ids(text) for text in ("Because.", "There.")]
    assert rows_of(batch.answers) == [prompts[0] + responses[0], prompts[1] + responses[1]]
    assert rows_of(batch.mismatched) == [prompts[0] + responses[1], prompts[1] + responses[0]]
    assert batch.prompt_lengths.tolist() == [len(prompt) for prompt in prompts]
    assert batch.is_desirable.tolist() == [True, False]
    assert dict(skipped.rows) == {"prompt and answer are longer than max_length": [4]}
