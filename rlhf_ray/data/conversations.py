"""Reads the values that hold conversations: lists of turns, Anthropic's transcripts, plain strings."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlhf_ray.data.skipped import UnusableRow
from rlhf_ray.types import Message

Turns = tuple[Message, ...]

ROLES = ("system", "user", "assistant")
TRANSCRIPT_START = "\n\nHuman:"
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
SPEAKER_ROLES = {"Human": "user", "Assistant": "assistant"}


def read_conversation(value: object, column: str) -> Turns | str:
    """The turns of a list of `{role, content}` or of a transcript `\\n\\nHuman: … \\n\\nAssistant: …`, else
    the string.

    An empty last assistant turn of a transcript, where the answer is to be written, is dropped.

    Raises:
        UnusableRow: not such a value; a turn is empty or malformed; the first turn after a system turn is not
            the user's.
    """
    if value is None:
        raise UnusableRow(f"'{column}' is missing")
    if isinstance(value, str):
        _check_text(value, column)
        if not value.startswith(TRANSCRIPT_START):
            return value
        turns = _transcript(value)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        turns = tuple(_turn(turn, column) for turn in value)
    else:
        raise UnusableRow(f"'{column}' is neither text nor a list of turns")
    return _check_turns(turns, column)


def read_prompt(value: object, column: str) -> Turns:
    """A conversation up to the answer; a plain string is one user turn.

    Raises:
        UnusableRow: as `read_conversation`; or it does not end in a user turn.
    """
    turns = read_conversation(value, column)
    if isinstance(turns, str):
        return ({"role": "user", "content": turns},)
    if turns[-1]["role"] != "user":
        raise UnusableRow(f"'{column}' does not end in a user turn")
    return turns


def read_answer(value: object, column: str) -> str:
    """The text of one assistant turn, given as a string or as a list of that turn.

    Raises:
        UnusableRow: missing, empty, or anything else.
    """
    if value is None:
        raise UnusableRow(f"'{column}' is missing")
    if isinstance(value, str):
        _check_text(value, column)
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes) and len(value) == 1:
        turn = _turn(value[0], column)
        if turn["role"] == "assistant":
            return turn["content"]
    raise UnusableRow(f"'{column}' is not one answer of the assistant")


def _transcript(text: str) -> Turns:
    pieces = SPEAKER.split(text)[1:]
    turns = [
        {"role": SPEAKER_ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return tuple(turns)


def _turn(turn: object, column: str) -> Message:
    if not isinstance(turn, dict):
        raise UnusableRow(f"'{column}' has a turn that is not an object with role and content")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise UnusableRow(f"'{column}' has a turn whose role is not one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise UnusableRow(f"'{column}' has a turn whose content is not text")
    _check_text(content, column)
    return {"role": role, "content": content}


def _check_turns(turns: Turns, column: str) -> Turns:
    if not turns:
        raise UnusableRow(f"'{column}' is empty")
    if any(not turn["content"] for turn in turns):
        raise UnusableRow(f"'{column}' has an empty turn")
    roles = [turn["role"] for turn in turns]
    if "system" in roles[1:]:
        raise UnusableRow(f"'{column}' has a system turn after the first turn")
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken[:1] != ["user"]:
        raise UnusableRow(f"'{column}' does not begin with a user turn")
    return turns


def _check_text(text: str, column: str) -> None:
    if not text.strip():
        raise UnusableRow(f"'{column}' has empty text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # Half of a surrogate pair, which JSON can spell and no tokenizer takes.
        raise UnusableRow(f"'{column}' is not valid Unicode") from error
