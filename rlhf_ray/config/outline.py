"""The schema as a tree to walk: which keys a section has, what a value must be, in words.

Walks the JSON Schema of `RunConfig`: `$ref` to a section, `anyOf` for `X | None`, `oneOf` with a
discriminator for sections told apart by their `type`.
"""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Iterable, Iterator
from typing import cast

from rlhf_ray.config import schema
from rlhf_ray.config.document import Document, KeyPath, Raw, dotted, kind, nearest

Node = dict[str, Raw]


@functools.cache
def root() -> Node:
    return cast(Node, schema.RunConfig.model_json_schema())


def branches(node: Node) -> list[Node]:
    """What a value may be, one schema each; `null` included."""
    if "$ref" in node:
        name = str(node["$ref"]).rpartition("/")[2]
        return [cast(dict[str, Node], root()["$defs"])[name]]
    alternatives = cast(list[Node], node.get("anyOf") or node.get("oneOf") or [])
    return [branch for alternative in alternatives for branch in branches(alternative)] or [node]


def discriminator(node: Node) -> dict[str, str]:
    """Tag -> name of the section, where the key `type` tells sections apart; else empty."""
    mapping = cast(Node, node.get("discriminator") or {}).get("mapping") or {}
    return {tag: str(ref).rpartition("/")[2] for tag, ref in cast(Node, mapping).items()}


def section(node: Node, raw: Raw) -> Node | None:
    """The section that a mapping at this node is; None where none may stand, or its type is not known."""
    if not isinstance(raw, dict):
        return None
    if tags := discriminator(node):
        tag = raw.get("type")
        return (
            cast(dict[str, Node], root()["$defs"])[tags[tag]]
            if isinstance(tag, str) and tag in tags
            else None
        )
    return next((branch for branch in branches(node) if "properties" in branch), None)


def properties(node: Node) -> dict[str, Node]:
    return cast(dict[str, Node], node["properties"])


def entries(node: Node) -> Node | None:
    """The schema of a list's entries; None where no list may stand."""
    return next((cast(Node, branch["items"]) for branch in branches(node) if "items" in branch), None)


def class_of(node: Node) -> type[schema.Section]:
    """The class of a section's schema."""
    return cast(type[schema.Section], getattr(schema, str(node["title"])))


def fill_defaults(raw: Raw, node: Node) -> None:
    """Add the default sections and lists that were left out, in place.

    A section that is written in part keeps the other defaults of its place: `sft.optimizer` has another
    learning rate than `online.optimizer`.
    """
    if isinstance(raw, list) and (entry := entries(node)) is not None:
        for value in raw:
            fill_defaults(value, entry)
    if not isinstance(raw, dict) or (here := section(node, raw)) is None:
        return
    for key, child in properties(here).items():
        default = child.get("default")
        if isinstance(default, dict | list):
            written = raw.setdefault(key, copy.deepcopy(default))
            # A mapping with keys of one's own, unlike a section, is written as a whole.
            if isinstance(default, dict) and isinstance(written, dict) and section(child, written):
                raw[key] = {**copy.deepcopy(default), **written}
        if key in raw:
            fill_defaults(raw[key], child)


def drop_unknown_keys(document: Document, raw: Raw, node: Node, path: KeyPath = ()) -> None:
    """Note every key that its section does not have, and take it out of the tree."""
    if isinstance(raw, list) and (entry := entries(node)) is not None:
        for index, value in enumerate(raw):
            drop_unknown_keys(document, value, entry, (*path, index))
    if not isinstance(raw, dict) or (here := section(node, raw)) is None:
        return
    known = properties(here)
    for key in [key for key in raw if key not in known]:
        document.add((*path, key), f"unknown key; {_remedy(path, key, list(known))}")
        del raw[key]
    for key, value in raw.items():
        drop_unknown_keys(document, value, known[key], (*path, key))


REFUSED: dict[KeyPath, str] = {
    (
        "online",
        key,
    ): "it cuts the distribution that is sampled from, and the ratio of the loss would be taken to "
    "another one; use temperature"
    for key in ("top_p", "top_k", "min_p")
}
"""Keys that people expect, and that are left out on purpose."""


def _remedy(path: KeyPath, key: str, known: list[str]) -> str:
    if (*path, key) in REFUSED:
        return REFUSED[*path, key]
    owners = [owner for owner, keys in all_sections() if key in keys and owner]
    near_owners = [owner for owner in owners if path and owner[0] == path[0]] or owners
    close = difflib.get_close_matches(key, known, n=1)
    if near_owners and (near_owners[0][:1] == path[:1] or not close):
        return f"{key} belongs in {either(dotted(owner) for owner in near_owners)}"
    if close:
        return f"did you mean {close[0]}?"
    return f"known here: {', '.join(known)}"


@functools.cache
def all_sections() -> tuple[tuple[KeyPath, frozenset[str]], ...]:
    """Key path of every section, those in lists left out, and its keys."""

    def walk(node: Node, path: KeyPath) -> Iterator[tuple[KeyPath, frozenset[str]]]:
        for branch in branches(node):
            if "properties" in branch:
                yield path, frozenset(properties(branch))
                for key, child in properties(branch).items():
                    yield from walk(child, (*path, key))

    return tuple(walk(root(), ()))


def either(words: Iterable[str]) -> str:
    """`a, b or c`."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def wanted(node: Node) -> str:
    """What a value must be: `a whole number greater than 0 or null`."""
    if tags := discriminator(node):
        return f"a section with type {either(tags)}"
    return either(_wanted(branch) for branch in branches(node))


def _wanted(branch: Node) -> str:
    if (choices := _choices(branch)) is not None:
        return either(str(choice) for choice in choices)
    name = "path" if branch.get("format") == "path" else str(branch["type"])
    words = {
        "integer": "a whole number",
        "number": "a number",
        "string": "text",
        "path": "a path",
        "boolean": "true or false",
        "array": "a list",
        "object": _with_keys(branch),
        "null": "null",
    }
    return f"{words[name]}{_range(branch)}"


def _with_keys(branch: Node) -> str:
    required = cast(list[str], branch.get("required") or [])
    return f"a section with {', '.join(required)}" if required else "a section"


def _choices(branch: Node) -> list[Raw] | None:
    if "const" in branch:
        return [branch["const"]]
    return cast(list[Raw] | None, branch.get("enum"))


def _range(branch: Node) -> str:
    limits = {
        "minimum": "at least {}",
        "exclusiveMinimum": "greater than {}",
        "maximum": "at most {}",
        "exclusiveMaximum": "less than {}",
        "minItems": "with at least {} entry",
    }
    if "minimum" in branch and "maximum" in branch:
        return f" from {branch['minimum']} to {branch['maximum']}"
    said = [words.format(branch[key]) for key, words in limits.items() if key in branch]
    return f" {' and '.join(said)}" if said else ""


def complaint(node: Node, raw: Raw) -> str:
    """Why a value cannot stand at a node."""
    choices = [str(choice) for branch in branches(node) for choice in _choices(branch) or []]
    types = {str(branch["type"]) for branch in branches(node) if "type" in branch}
    fitting = {
        "a number": {"integer", "number"},
        "text": {"string"},
        "a list": {"array"},
        "a section": {"object"},
    }
    is_of_kind = bool(types & fitting.get(kind(raw), {"boolean"}))
    unlike = "" if is_of_kind else f", not {kind(raw)}"
    return f"must be {wanted(node)}{unlike}{nearest(raw, choices) if isinstance(raw, str) else ''}"
