"""Recognises the columns that datasets have and turns rows into typed examples.

The names are TRL's: `messages` or `text`; `prompt`; `prompt` + `completion`, also with `label`; `chosen` +
`rejected` with or without `prompt`. A value is a list of turns, a transcript `\\n\\nHuman: … \\n\\nAssistant:
…`, or a plain string, which is one user turn in a prompt and one assistant turn in an answer.

A row that cannot be used is skipped and counted by reason; only a dataset without any usable row is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from rlhf_ray.config.schema import DatasetSection
from rlhf_ray.data.conversations import Turns, read_answer, read_conversation, read_prompt
from rlhf_ray.data.files import Row
from rlhf_ray.data.loading import Table, columns_of, first_rows
from rlhf_ray.data.skipped import Skipped, UnusableRow
from rlhf_ray.errors import DataError

Purpose = Literal["sft", "prompts", "pairs", "labelled answers"]

NEEDED: dict[Purpose, tuple[tuple[str, ...], ...]] = {
    "sft": (("messages",), ("prompt", "completion"), ("text",)),
    "prompts": (("prompt",), ("messages",)),
    "pairs": (("chosen", "rejected"),),
    "labelled answers": (("prompt", "completion", "label"), ("chosen", "rejected")),
}
"""Alternatives of each purpose, the preferred one first; a table is read by the first that it has."""

REWARD_ARGUMENTS = ("prompts", "completions")
"""Named arguments of reward functions, which the other columns are passed beside."""

ROWS_CHECKED = 100

FLOAT32_MAX = 3.4028234e38


@dataclass(frozen=True)
class SFTExample:
    """Fields: id: position in the source; messages: a conversation, or () and `text` is all there is."""

    id: int
    messages: Turns
    text: str | None = None


@dataclass(frozen=True)
class PromptExample:
    """Fields: id: position in the source; messages: up to the answer; columns: the dataset's others."""

    id: int
    messages: Turns
    columns: dict[str, object]


@dataclass(frozen=True)
class PreferenceExample:
    """Two answers to one prompt.

    Fields:
        id: position in the source.
        messages: the prompt, which ends in a user turn.
        chosen, rejected: text of the answers.
        margin: how much better the chosen answer is said to be; 0 where the dataset has no column `margin`.
        columns: the dataset's other columns (annotator, source, …).
        soft_label: probability that `chosen` is really the preferred one, 0.5 to 1; 1 where the dataset has
            no column `soft_label`.
    """

    id: int
    messages: Turns
    chosen: str
    rejected: str
    margin: float
    columns: dict[str, object]
    soft_label: float = 1.0


@dataclass(frozen=True)
class LabelledExample:
    """One answer, and whether it is a desirable one.

    Fields:
        id: position in the source.
        messages: the prompt, which ends in a user turn.
    """

    id: int
    messages: Turns
    completion: str
    is_desirable: bool


Example = TypeVar("Example", SFTExample, PromptExample, PreferenceExample, LabelledExample)


def sft_examples(table: Table) -> tuple[list[SFTExample], Skipped]:
    """Raises DataError: the columns are not there, or no row can be used."""
    form = _form(table.columns, "sft", table.source)
    readers: dict[tuple[str, ...], Callable[[int, Row], SFTExample]] = {
        ("messages",): _sft_messages,
        ("prompt", "completion"): _sft_completion,
        ("text",): _sft_text,
    }
    return _convert(table, readers[form])


def prompt_examples(table: Table) -> tuple[list[PromptExample], Skipped]:
    """Raises DataError: the columns are not there, or no row can be used."""
    readers: dict[tuple[str, ...], Callable[[int, Row], PromptExample]] = {
        ("prompt",): _prompt,
        ("messages",): _prompt_of_messages,
    }
    return _convert(table, readers[_form(table.columns, "prompts", table.source)])


def preference_examples(table: Table) -> tuple[list[PreferenceExample], Skipped]:
    """Raises DataError: the columns are not there, or no row can be used."""
    _form(table.columns, "pairs", table.source)
    return _convert(table, _pair)


def has_labels(table: Table) -> bool:
    """Whether a dataset for unpaired preferences is unpaired itself; otherwise it holds pairs.

    Raises:
        DataError: it is neither.
    """
    return "label" in _form(table.columns, "labelled answers", table.source)


def labelled_examples(table: Table) -> tuple[list[LabelledExample], Skipped]:
    """Raises DataError: the columns are not there, or no row can be used."""
    return _convert(table, _labelled)


def check_columns(section: DatasetSection, purpose: Purpose) -> list[str]:
    """What is wrong with a dataset, as far as its first rows show it; nothing is tokenised.

    A hub name gives no mistakes here: it is not asked over the network before the run.
    """
    try:
        rows = first_rows(section, ROWS_CHECKED)
        if rows is not None:
            _form(columns_of(rows), purpose, section.path)
    except DataError as error:
        return [str(error)]
    return []


def reward_columns(section: DatasetSection) -> list[str] | None:
    """Columns that reward sources see, as far as the first rows show them; None where they cannot be told."""
    try:
        rows = first_rows(section, ROWS_CHECKED)
    except DataError:
        return None
    return None if rows is None else [name for name in columns_of(rows) if name not in ("prompt", "messages")]


def has_soft_labels(section: DatasetSection, purpose: Purpose) -> bool:
    """Whether one of the first rows is a pair with a `soft_label` below 1; False where it cannot be told."""
    try:
        rows = first_rows(section, ROWS_CHECKED)
        if rows is None or "chosen" not in _form(columns_of(rows), purpose, section.path):
            return False
    except DataError:
        return False
    return any(_is_soft(row) for row in rows)


def _is_soft(row: Row) -> bool:
    try:
        return _soft_label(row) < 1
    except UnusableRow:
        return False


def _form(columns: Sequence[str], purpose: Purpose, source: str) -> tuple[str, ...]:
    """The first alternative whose columns are all there."""
    if purpose == "prompts" and (taken := [name for name in REWARD_ARGUMENTS if name in columns]):
        raise DataError(
            f"dataset.path={source}: column '{taken[0]}' has the name of an argument of reward functions; "
            "rename it"
        )
    for form in NEEDED[purpose]:
        if all(name in columns for name in form):
            return form
    wanted = ", or ".join(" and ".join(f"'{name}'" for name in form) for form in NEEDED[purpose])
    raise DataError(
        f"dataset.path={source}: has the columns {', '.join(map(repr, columns)) or '(none)'}; "
        f"{purpose} needs {wanted}; rename the columns or use another dataset"
    )


def _convert(table: Table, read: Callable[[int, Row], Example]) -> tuple[list[Example], Skipped]:
    examples: list[Example] = []
    reasons: dict[str, list[int]] = {}
    for position, row in zip(table.positions, table.rows, strict=True):
        try:
            examples.append(read(position, row))
        except UnusableRow as unusable:
            reasons.setdefault(str(unusable), []).append(position)
    skipped = Skipped(reasons)
    if not examples:
        raise DataError(f"dataset.path={table.source}: none of its rows can be used: {skipped}")
    return examples, skipped


def _sft_messages(position: int, row: Row) -> SFTExample:
    return _with_answer(SFTExample(position, _messages(row)), "messages")


def _sft_completion(position: int, row: Row) -> SFTExample:
    # Unpaired preferences: a disapproved answer is not one to imitate.
    if "label" in row and _label(row["label"]) is False:
        raise UnusableRow("'label' is false")
    answer = read_answer(row.get("completion"), "completion")
    prompt = read_prompt(row.get("prompt"), "prompt")
    return SFTExample(position, (*prompt, {"role": "assistant", "content": answer}))


def _sft_text(position: int, row: Row) -> SFTExample:
    text = read_conversation(row.get("text"), "text")
    if isinstance(text, str):
        return SFTExample(position, (), text)
    return _with_answer(SFTExample(position, text), "text")


def _with_answer(example: SFTExample, column: str) -> SFTExample:
    if not any(turn["role"] == "assistant" for turn in example.messages):
        raise UnusableRow(f"'{column}' has no assistant turn")
    return example


def _messages(row: Row) -> Turns:
    messages = read_conversation(row.get("messages"), "messages")
    if isinstance(messages, str):
        raise UnusableRow("'messages' is not a list of turns")
    return messages


def _label(value: object) -> bool:
    """True, False, 0, 1, and their spellings in a CSV file."""
    label = {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())
    if label is None:
        raise UnusableRow("'label' is neither true nor false")
    return label


def _prompt(position: int, row: Row) -> PromptExample:
    return PromptExample(position, read_prompt(row.get("prompt"), "prompt"), _without(row, "prompt"))


def _prompt_of_messages(position: int, row: Row) -> PromptExample:
    messages = _messages(row)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return PromptExample(position, read_prompt(messages, "messages"), _without(row, "messages"))


def _pair(position: int, row: Row) -> PreferenceExample:
    prompt = read_prompt(row["prompt"], "prompt") if row.get("prompt") is not None else None
    if prompt is not None and all(_is_answer(row, name) for name in ("chosen", "rejected")):
        chosen, rejected = read_answer(row["chosen"], "chosen"), read_answer(row["rejected"], "rejected")
    else:
        shared, chosen, rejected = _split_pair(row)
        if prompt is not None and shared[-len(prompt) :] != prompt:
            raise UnusableRow("'prompt' is not the conversation of 'chosen' and 'rejected'")
        prompt = shared
    if chosen.strip() == rejected.strip():
        raise UnusableRow("'chosen' and 'rejected' are the same")
    columns = _without(row, "prompt", "chosen", "rejected", "margin", "soft_label")
    return PreferenceExample(position, prompt, chosen, rejected, _margin(row), columns, _soft_label(row))


def _labelled(position: int, row: Row) -> LabelledExample:
    answer = read_answer(row.get("completion"), "completion")
    return LabelledExample(
        position, read_prompt(row.get("prompt"), "prompt"), answer, _label(row.get("label"))
    )


def _is_answer(row: Row, column: str) -> bool:
    """An answer alone, as against a whole conversation that ends in the answer."""
    value = row.get(column)
    if isinstance(value, str):
        return isinstance(read_conversation(value, column), str)
    return isinstance(value, Sequence) and len(value) == 1


def _split_pair(row: Row) -> tuple[Turns, str, str]:
    """Prompt and answers of two conversations; the prompt is what both begin with, up to a user turn."""
    chosen = read_conversation(row.get("chosen"), "chosen")
    rejected = read_conversation(row.get("rejected"), "rejected")
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise UnusableRow("there is no 'prompt', and 'chosen' and 'rejected' are not both conversations")
    if chosen == rejected:
        raise UnusableRow("'chosen' and 'rejected' are the same")
    shared = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours != theirs:
            break
        shared += 1
    while shared and chosen[shared - 1]["role"] != "user":
        shared -= 1
    if not shared:
        raise UnusableRow("'chosen' and 'rejected' do not share a prompt")
    answers = chosen[shared:], rejected[shared:]
    if any([turn["role"] for turn in answer] != ["assistant"] for answer in answers):
        raise UnusableRow(
            "'chosen' and 'rejected' are not one assistant turn each after the turns that they share"
        )
    return chosen[:shared], answers[0][0]["content"], answers[1][0]["content"]


def _margin(row: Row) -> float:
    """0 where the row has none."""
    value = row.get("margin")
    margin = 0.0 if value is None else _number(value)
    # The batch holds margins as float32.
    if not abs(margin) <= FLOAT32_MAX:
        raise UnusableRow("'margin' is not a finite number")
    return margin


def _soft_label(row: Row) -> float:
    """1 where the row has none."""
    value = row.get("soft_label")
    probability = 1.0 if value is None else _number(value)
    if not 0.5 <= probability <= 1:
        raise UnusableRow("'soft_label' is not a number from 0.5 to 1")
    return probability


def _number(value: object) -> float:
    """A number, or its spelling in a CSV file; NaN for anything else."""
    if not isinstance(value, int | float | str) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _without(row: Row, *names: str) -> dict[str, object]:
    return {name: value for name, value in row.items() if name not in names}
