"""What a person wrote, before it is judged: a tree of plain values, and where each was written."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, SecretStr

Raw = dict[str, "Raw"] | list["Raw"] | str | int | float | bool | None
KeyPath = tuple[str | int, ...]

_SECRET = "token|secret|password|passwd|passphrase|credentials?|(?:api|access|private|secret)[-_]?key"
_SECRET_KEY = re.compile(f"({_SECRET})$", re.IGNORECASE)
_SECRET_VALUE = re.compile(rf"((?:{_SECRET})['\"]?\s*[:=]).+", re.IGNORECASE | re.DOTALL)
_SECRET_NAMES = ("token", "secret", "password", "api_key", "access_key", "credentials")
_URL_USER = re.compile(r"://[^/\s'\"]*@")
_LONGEST_SHOWN = 60


def is_secret(key: str | int) -> bool:
    """Whether the values of a key must never be shown; also of one that is misspelt."""
    if not isinstance(key, str):
        return False
    close = difflib.get_close_matches(key.lower(), _SECRET_NAMES, n=1, cutoff=0.85)
    return bool(close) or _SECRET_KEY.search(key) is not None


def without_secrets(text: str) -> str:
    """Written text with whatever follows a secret's key cut off, and without the passwords of URLs."""
    return _URL_USER.sub("://***@", _SECRET_VALUE.sub(r"\1***", text))


def redacted(value: Raw) -> Raw:
    """With `***` for whatever stands under a secret's key."""
    if isinstance(value, list):
        return [redacted(entry) for entry in value]
    if isinstance(value, dict):
        return {
            key: "***" if is_secret(key) and entry and not isinstance(entry, bool) else redacted(entry)
            for key, entry in value.items()
        }
    return value


def dotted(path: KeyPath) -> str:
    return ".".join(str(piece) for piece in path)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean x?`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def shown(value: Raw) -> str:
    """A value as the person would write it, cut where it is long."""
    if isinstance(value, str) and value and value.isprintable() and value == value.strip():
        text = _URL_USER.sub("://***@", value)
    elif isinstance(value, float):
        text = re.sub(r"e([-+])0", r"e\1", repr(value))
    else:
        text = without_secrets(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


@dataclass(frozen=True)
class Place:
    """Where something was written.

    Fields:
        label: `file:line` or `override key.path=value`.
        order: mistakes are listed in this order.
        path: the key path that the label itself names; None for a file.
    """

    label: str
    order: int
    path: KeyPath | None = None


@dataclass
class Document:
    """A configuration in the making, with the mistakes found so far.

    Fields:
        tree: the sections, as written.
        places: key path -> where it was written; else it is where the section around it is.
    """

    tree: dict[str, Raw] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    _mistakes: list[tuple[int, str]] = field(default_factory=list)

    @property
    def mistakes(self) -> tuple[str, ...]:
        """Every mistake once, in the order of the file, then of the overrides."""
        ordered = sorted(self._mistakes, key=lambda mistake: mistake[0])
        return tuple(dict.fromkeys(text for _, text in ordered))

    def value(self, path: KeyPath) -> Raw:
        """The value at a key path; None where there is none."""
        here: Raw = self.tree
        for piece in path:
            if isinstance(here, dict) and isinstance(piece, str):
                here = here.get(piece)
            elif isinstance(here, list) and isinstance(piece, int) and piece < len(here):
                here = here[piece]
            else:
                return None
        return here

    def holds(self, path: KeyPath) -> bool:
        """Whether something, `null` included, was written at a key path."""
        parent = self.value(path[:-1])
        last = path[-1]
        if isinstance(parent, list):
            return isinstance(last, int) and last < len(parent)
        return isinstance(parent, dict) and last in parent

    def place(self, path: KeyPath) -> Place:
        return next(
            (self.places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.places), Place("", 0)
        )

    def add(self, path: KeyPath, sentence: str, value: str | None = None) -> None:
        """Note a mistake as `place: key.path=value: sentence`.

        Args:
            path: what the sentence is about; () for the configuration as a whole.
            value: how the value is shown; by default as written, and not at all for sections.
        """
        place = self.place(path)
        parts = [place.label] if place.label else []
        if path and place.path != path:
            if value is None and self.holds(path) and not isinstance(self.value(path), dict):
                value = shown(self.value(path))
            if value and any(map(is_secret, path)):
                value = "***"
            parts.append(dotted(path) + (f"={value}" if value else ""))
        self._mistakes.append((place.order, ": ".join([*parts, sentence])))

    def note(self, place: Place, sentence: str) -> None:
        """Note a mistake that has a place, and no key path."""
        self._mistakes.append((place.order, f"{place.label}: {sentence}"))


def plain(value: object, path: KeyPath, document: Document) -> Raw:
    """Python values (mappings, sequences, paths, sections) as a tree; anything else is a mistake."""
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, Path):
        value = str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return as_text(value, path, document)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                document.add(path, f"the key {key!r} must be text")
        return {key: plain(v, (*path, key), document) for key, v in value.items() if isinstance(key, str)}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(entry, (*path, index), document) for index, entry in enumerate(value)]
    document.add(
        path, f"must be text, a number, true, false, null, a list or a section, not {type(value).__name__}"
    )
    return None


def is_text(value: str) -> bool:
    """False for lone surrogates, which cannot be encoded, and for NUL, which no file name may hold."""
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def as_text(value: str, path: KeyPath, document: Document) -> str:
    """The text, or a mistake where no file and no terminal could hold it."""
    if not is_text(value):
        document.add(path, "holds a character that is not text", value=ascii(value))
        return ""
    return value


def kind(value: Raw) -> str:
    """What a value is, in words."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return "a number"
    return {str: "text", list: "a list", dict: "a section"}[type(value)]
