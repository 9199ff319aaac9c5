"""YAML and overrides, read into a `Document`.

YAML is read with the number and truth rules of YAML 1.2 (`1e-5` is a number, `no` is text), and a key given
twice is a mistake. Overrides change the tree afterwards; what they wrote is located at the override.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from rlhf_ray.config import outline
from rlhf_ray.config.document import (
    Document,
    KeyPath,
    Place,
    Raw,
    as_text,
    dotted,
    is_secret,
    is_text,
    kind,
    shown,
    without_secrets,
)
from rlhf_ray.errors import ConfigError

_AFTER_THE_FILE = 1_000_000
LARGEST_TEXT = 1_000_000
"""Characters of a file."""
MOST_VALUES = 100_000
"""Of a file, aliases taken for what they stand for: a few lines of them may stand for more than there is room
for."""


def read_limited(path: Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: it is longer than any configuration, or has no end.
        OSError, UnicodeDecodeError, ValueError: it cannot be read.
    """
    with path.open(encoding="utf-8") as file:
        text = file.read(LARGEST_TEXT + 1)
    if len(text) > LARGEST_TEXT:
        raise ConfigError(f"{path}: has more than {LARGEST_TEXT:,} characters, and cannot be a configuration")
    return text


def read_yaml(text: str, name: str, document: Document) -> None:
    """Fill a document from the text of a file.

    Raises:
        ConfigError: it is not YAML, or not a section at the top.
    """
    document.places[()] = Place(name, 0)
    reader = _Reader(
        document, lambda node: Place(f"{name}:{node.start_mark.line + 1}", node.start_mark.line + 1)
    )
    try:
        tree = reader.read(text, ())
    except _NotYaml as error:
        line = "" if error.line is None else f":{error.line}"
        raise ConfigError(f"{name}{line}: not valid YAML: {error.problem}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{name}: must hold sections (key: value), not {kind(tree)}")
    document.tree = tree or {}


def apply_override(text: str, number: int, document: Document) -> None:
    """Write one `key.path=value` into the tree; sections on the way to it are created, with their defaults.

    Args:
        number: its position among the overrides.
    """
    key, equals, written = text.partition("=")
    pieces = key.strip().split(".")
    label = f"{key}=***" if any(map(is_secret, pieces)) else without_secrets(text)
    place = Place(f"override {label}", _AFTER_THE_FILE + number)
    if not is_text(text):
        document.note(Place(ascii(place.label), place.order), "holds a character that is not text")
    elif not equals or not all(pieces):
        document.note(place, "write it as key.path=value")
    elif not written.strip():
        document.note(place, "has no value; write null for none")
    elif (path := _locate(pieces, place, document)) is not None:
        document.places = {p: where for p, where in document.places.items() if p[: len(path)] != path}
        here = document.places[path] = Place(place.label, place.order, path)
        try:
            _assign(path, _Reader(document, lambda _: here).read(written, path), document)
            outline.fill_defaults(document.tree, outline.root())
        except _NotYaml as error:
            document.note(place, f"the value is not valid YAML ({error.problem}); put it in quotes")


def _locate(pieces: Sequence[str], place: Place, document: Document) -> KeyPath | None:
    """The key path of an override, with the sections on the way to it created; None after a mistake."""
    path: KeyPath = ()
    for depth, piece in enumerate(pieces):
        here = document.value(path)
        if isinstance(here, list):
            known = {str(index): index for index in range(len(here) + 1)}
            if piece not in known:
                choice = f"0 to {len(here)}, where {len(here)} appends" if here else "0"
                document.note(place, f"{dotted(path)} is a list; name an entry by its number, {choice}")
                return None
            path = (*path, known[piece])
        elif isinstance(here, dict):
            path = (*path, piece)
        else:
            document.note(place, f"{dotted(path)} is {kind(here)}, not a section")
            return None
        if depth + 1 < len(pieces) and document.value(path) is None:
            _assign(path, [] if pieces[depth + 1].isdecimal() else {}, document)
            outline.fill_defaults(document.tree, outline.root())
            document.places[path] = place
    return path


def _assign(path: KeyPath, value: Raw, document: Document) -> None:
    parent, last = document.value(path[:-1]), path[-1]
    if isinstance(parent, list) and isinstance(last, int):
        parent[last : last + 1] = [value]
    elif isinstance(parent, dict) and isinstance(last, str):
        parent[last] = value


class _Loader(yaml.SafeLoader):
    """Only the scalar types that a configuration has; everything else stays text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own table)


_TAG = "tag:yaml.org,2002:"
_STARTS = list("+-.0123456789")
_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    _TAG + "bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(_TAG + "int", re.compile(r"^[-+]?[0-9][0-9_]*$"), _STARTS)
_Loader.add_implicit_resolver(
    _TAG + "float", re.compile(r"^[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"), _STARTS
)


class _NotYaml(Exception):
    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line


class _Reader:
    """Turns YAML's nodes into a tree, and notes where each was written."""

    def __init__(self, document: Document, place: Callable[[yaml.Node], Place]) -> None:
        self.document = document
        self.place = place
        self.around: list[yaml.Node] = []
        self.num_values = 0

    def read(self, text: str, path: KeyPath) -> Raw:
        try:
            node = yaml.compose(text, Loader=_Loader)
            return None if node is None else self._build(node, path)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise _NotYaml(error.problem or error.context or "", mark.line + 1 if mark else None) from error
        except yaml.reader.ReaderError as error:
            raise _NotYaml(f"the character {chr(error.character)!a} is not allowed") from error
        except (ValueError, OverflowError) as error:  # an escape in quotes that names no character
            raise _NotYaml("an escape sequence names no character") from error
        except RecursionError as error:
            raise _NotYaml("nested too deeply") from error

    def _build(self, node: yaml.Node, path: KeyPath) -> Raw:
        self.num_values += 1
        if self.num_values > MOST_VALUES:
            raise _NotYaml(f"its aliases stand for more than {MOST_VALUES:,} values")
        self.document.places.setdefault(path, self.place(node))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if any(node is outer for outer in self.around):
            self.document.add(path, "an alias may not refer to the section that it stands in")
            return None
        self.around.append(node)
        built = (
            self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._sequence(node, path)
        )
        self.around.pop()
        return built

    def _sequence(self, node: yaml.Node, path: KeyPath) -> Raw:
        return [self._build(child, (*path, index)) for index, child in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> Raw:
        built: dict[str, Raw] = {}
        for key_node, child in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.document.add(path, "a key must be a word, not a list or a section")
                continue
            key = as_text(key_node.value, path, self.document)
            here = (*path, key)
            if key in built:
                where = self.place(key_node)
                other = "" if where.path else f", here and in line {where.order}"
                self.document.add(here, f"given twice{other}; keep one", value="")
                continue
            self.document.places.setdefault(here, self.place(key_node))
            built[key] = self._build(child, here)
        return built

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Raw:
        text = str(node.value)
        match node.tag.removeprefix(_TAG):
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int" | "float" as tag:
                return self._number(text, tag, path)
            case "str":
                return as_text(text, path, self.document)
        self.document.add(path, f"the YAML tag {node.tag} is not supported", value=shown(text))
        return None

    def _number(self, text: str, tag: str, path: KeyPath) -> Raw:
        digits = text.replace("_", "")
        try:
            number = int(digits) if tag == "int" else float(digits)
        except ValueError:
            self.document.add(path, "is not a number that can be read", value=shown(text))
            return None
        # 1e4 may stand where a whole number is wanted.
        return int(number) if "e" in digits.lower() and float(number).is_integer() else number
