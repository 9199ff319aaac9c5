"""A whole dataset of examples to token arrays. What does not fit is left out or cut, and reported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np

from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.conversations import Turns
from rlhf_ray.data.formats import PreferenceExample, PromptExample, SFTExample
from rlhf_ray.data.skipped import Skipped
from rlhf_ray.errors import DataError
from rlhf_ray.types import PairBatch, Prompts, Ragged, SFTBatch


class _Prompted(Protocol):
    @property
    def id(self) -> int: ...
    @property
    def messages(self) -> Turns: ...


ExampleT = TypeVar("ExampleT", bound=_Prompted)


class Report:
    """Collects what becomes of each row, and the greatest length that was asked for."""

    def __init__(self, limit_name: str, limit: int) -> None:
        self.limit_name, self.limit = limit_name, limit
        self.longest = 0
        self.truncated: list[int] = []
        self.reasons: dict[str, list[int]] = {}

    def measure(self, length: int) -> bool:
        """Whether a sequence of that many tokens fits."""
        self.longest = max(self.longest, length)
        return length <= self.limit

    def skip(self, position: int, reason: str) -> None:
        self.reasons.setdefault(reason, []).append(position)

    def with_prompts(
        self, examples: Iterable[ExampleT], formatter: ChatFormatter
    ) -> Iterator[tuple[ExampleT, list[int]]]:
        """Each example with the tokens of its prompt; where the template refuses it, the row is skipped."""
        for example in examples:
            try:
                ids = formatter.prompt_ids(example.messages)
            except DataError as error:
                self.skip(example.id, str(error))
                continue
            yield example, ids

    def admits(self, position: int, length: int, too_long: str) -> bool:
        """Whether a sequence of that many tokens fits; where it does not, the row is skipped.

        Args:
            too_long: the reason, up to "than" the limit.
        """
        fits = self.measure(length)
        if not fits:
            self.skip(position, f"{too_long} than {self.limit_name}")
        return fits

    def finish(self, num_left: int) -> Skipped:
        """Raises DataError: nothing is left."""
        skipped = Skipped(self.reasons, self.truncated)
        if not num_left:
            raise DataError(
                f"{self.limit_name}={self.limit}: no row is left: {skipped}; the longest has {self.longest} "
                f"tokens; raise {self.limit_name} or use other rows"
            )
        return skipped


def encode_sft(
    examples: Sequence[SFTExample], formatter: ChatFormatter, max_length: int
) -> tuple[SFTBatch, Skipped]:
    """Rows up to their last target token, cut at the end to `max_length` tokens.

    A cut row keeps the targets that fit, without the EOS that it never reached; a row whose prompt leaves no
    room for a target is left out.

    Raises:
        DataError: nothing is left.
        ModelError: the chat template cannot be used (see `ChatFormatter`).
    """
    report = Report("max_length", max_length)
    tokens: list[list[int]] = []
    targets: list[list[bool]] = []
    for example in examples:
        try:
            ids, is_target = _sft_row(example, formatter)
        except DataError as error:
            report.skip(example.id, str(error))
            continue
        fits = report.measure(len(ids))
        length = _length_to_last_target(is_target[:max_length])
        if not length:
            report.skip(example.id, "no target token fits into max_length")
            continue
        if not fits:
            report.truncated.append(example.id)
        tokens.append(ids[:length])
        targets.append(is_target[:length])
    skipped = report.finish(len(tokens))
    return SFTBatch(Ragged.from_rows(tokens, np.int32), Ragged.from_rows(targets, np.bool_)), skipped


def encode_pairs(
    examples: Sequence[PreferenceExample], formatter: ChatFormatter, max_length: int
) -> tuple[PairBatch, Skipped]:
    """Both sequences of each pair, in the order of the examples that are kept.

    A pair of which either sequence is longer than `max_length` is left out: a cut answer is another answer
    than the one that was judged.

    Raises:
        DataError: nothing is left.
    """
    report = Report("max_length", max_length)
    lengths: list[int] = []
    margins: list[float] = []
    soft_labels: list[float] = []
    chosen: list[list[int]] = []
    rejected: list[list[int]] = []
    for example, prompt in report.with_prompts(examples, formatter):
        better = prompt + formatter.completion_ids(example.chosen)
        worse = prompt + formatter.completion_ids(example.rejected)
        if not report.admits(example.id, max(len(better), len(worse)), "prompt and answer are longer"):
            continue
        lengths.append(len(prompt))
        margins.append(example.margin)
        soft_labels.append(example.soft_label)
        chosen.append(better)
        rejected.append(worse)
    skipped = report.finish(len(chosen))
    batch = PairBatch(
        prompt_lengths=np.asarray(lengths, dtype=np.int64),
        chosen=Ragged.from_rows(chosen, np.int32),
        rejected=Ragged.from_rows(rejected, np.int32),
        margin=np.asarray(margins, dtype=np.float32),
        soft_label=np.asarray(soft_labels, dtype=np.float32),
    )
    return batch, skipped


def encode_prompts(
    examples: Sequence[PromptExample], formatter: ChatFormatter, max_prompt_length: int
) -> tuple[Prompts, Skipped]:
    """Prompts of at most `max_prompt_length` tokens, in the order of the examples that are kept.

    Raises:
        DataError: nothing is left.
    """
    report = Report("max_prompt_length", max_prompt_length)
    kept: list[PromptExample] = []
    tokens: list[list[int]] = []
    for example, ids in report.with_prompts(examples, formatter):
        if not report.admits(example.id, len(ids), "the prompt is longer"):
            continue
        kept.append(example)
        tokens.append(ids)
    skipped = report.finish(len(kept))
    prompts = Prompts(
        ids=np.asarray([example.id for example in kept], dtype=np.int64),
        messages=tuple(example.messages for example in kept),
        token_ids=Ragged.from_rows(tokens, np.int32),
        columns=tuple(example.columns for example in kept),
    )
    return prompts, skipped


def _sft_row(example: SFTExample, formatter: ChatFormatter) -> tuple[list[int], list[bool]]:
    if example.text is None:
        return formatter.sft_row(example.messages)
    return formatter.text_row(example.text)


def _length_to_last_target(is_target: list[bool]) -> int:
    """Number of tokens up to the last target; 0 without any."""
    return max((position + 1 for position, target in enumerate(is_target) if target), default=0)
