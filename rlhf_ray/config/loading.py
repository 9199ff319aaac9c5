"""From a file, a packaged configuration or a mapping, with overrides, to a `RunConfig`; and back.

Every mistake is reported at once: unknown keys are taken out before the schema judges the values, and the
rules of a section that span several keys are tried even where a section inside it is wrong.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import PlainValidator, ValidationError, create_model
from pydantic_core import ErrorDetails

from rlhf_ray.config import outline
from rlhf_ray.config.document import Document, KeyPath, Raw, nearest, plain, redacted
from rlhf_ray.config.outline import Node
from rlhf_ray.config.reading import apply_override, read_limited, read_yaml
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import ConfigError


def load_config(source: str | Path | Mapping[str, object], overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a configuration.

    Args:
        source: a YAML file, the name of a packaged configuration, or a mapping.
        overrides: `key.path=value`, applied in order; values are YAML, list entries are named by number
            (`online.rewards.0.weight=0`), and absent sections are created.

    Raises:
        ConfigError: every mistake, one sentence each.
    """
    document = read_document(source, overrides)
    config = parse_document(document)
    if config is None:
        raise ConfigError(*document.mistakes)
    return config


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The configuration with some values changed, validated anew.

    Raises:
        ConfigError: every mistake, one sentence each.
    """
    return load_config({name: getattr(config, name) for name in RunConfig.model_fields}, overrides)


def dump_config(config: RunConfig) -> dict[str, object]:
    """All values, defaults included, as JSON can hold them; secrets are `***`."""
    return cast(dict[str, object], redacted(config.model_dump(mode="json")))


def read_document(source: str | Path | Mapping[str, object], overrides: Sequence[str] = ()) -> Document:
    """The source with its overrides and default sections, not yet validated.

    Raises:
        ConfigError: there is no such file, or it is not YAML.
    """
    document = Document()
    if isinstance(source, Mapping):
        document.tree = cast(dict[str, Raw], plain(source, (), document))
    else:
        read_yaml(read_text(source), str(source), document)
    outline.fill_defaults(document.tree, outline.root())
    for number, override in enumerate(overrides):
        apply_override(override, number, document)
    return document


def read_text(source: str | Path) -> str:
    """Of a file, or of a packaged configuration.

    Raises:
        ConfigError: there is no such file, or it is not text.
    """
    path = Path(source)
    try:
        return read_limited(path)
    except FileNotFoundError:
        return _read_packaged(source)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: is not text in UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        problem = error.strerror if isinstance(error, OSError) else error
        reason = "is a folder; name a file in it" if os.path.isdir(path) else f"cannot be read ({problem})"
        raise ConfigError(f"{source}: {reason}") from error


def _read_packaged(source: str | Path) -> str:
    folder = resources.files("configs")
    packaged = {Path(entry.name).stem: entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    name = str(source).removeprefix("configs/").removesuffix(".yaml")
    if name in packaged:
        return packaged[name].read_text(encoding="utf-8")
    beside = Path(source).parent
    siblings = [str(path) for path in beside.glob("*.y*ml")] if os.path.isdir(beside) else []
    hint = nearest(str(source), siblings) or nearest(name, packaged)
    raise ConfigError(
        f"{source}: no such file, nor a packaged configuration ({', '.join(sorted(packaged))}){hint}"
    )


def parse_document(document: Document) -> RunConfig | None:
    """Validate; None, and mistakes in the document, where it is wrong."""
    outline.drop_unknown_keys(document, document.tree, outline.root())
    try:
        # As JSON: its strict mode takes lists for tuples and text for paths, but no text for numbers.
        config = RunConfig.model_validate_json(json.dumps(document.tree), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
        for detail in details:
            _explain(document, detail)
        _explain_outer_rules(document, [_locate(document.tree, detail["loc"])[0] for detail in details])
        return None
    return None if document.mistakes else config


def _explain(document: Document, detail: ErrorDetails) -> None:
    """Say one of pydantic's errors in the words of a person."""
    path, node = _locate(document.tree, detail["loc"])
    raw = document.value(path)
    if detail["type"] == "value_error":
        _explain_rule(document, path, node, str(detail["ctx"]["error"]))
    elif detail["type"] == "missing":
        document.add(path, f"missing; give {outline.wanted(node)}")
    elif detail["type"] == "union_tag_not_found":
        document.add((*path, "type"), f"missing; give {outline.either(outline.discriminator(node))}")
    elif detail["type"] == "union_tag_invalid":
        tag, tags = document.value((*path, "type")), outline.discriminator(node)
        hint = nearest(tag, tags) if isinstance(tag, str) else ""
        document.add((*path, "type"), f"must be {outline.either(tags)}{hint}")
    elif detail["type"] != "too_short" or not raw:  # entries that are wrong do not count as entries
        document.add(path, outline.complaint(node, raw))


_RULE = re.compile(r"(?P<key>\w+)(?:=(?P<value>[^:]*))?: (?P<sentence>.*)")


def _explain_rule(document: Document, path: KeyPath, node: Node, message: str) -> None:
    """A validator raises one line a mistake: `key=value: sentence`, `key: sentence` or a sentence."""
    section = outline.section(node, document.value(path))
    keys = outline.properties(section) if section else {}
    for line in message.splitlines():
        rule = _RULE.fullmatch(line)
        if rule and rule["key"] in keys:
            document.add((*path, rule["key"]), rule["sentence"], value=rule["value"] or "")
        else:
            document.add(path, line)


def _locate(tree: Raw, location: tuple[int | str, ...]) -> tuple[KeyPath, Node]:
    """Key path and schema of an error; pydantic's location also names branches of unions."""
    path: KeyPath = ()
    node, raw = outline.root(), tree
    pieces = list(location)
    while pieces:
        piece = pieces.pop(0)
        if outline.discriminator(node):
            if not pieces:
                break
            piece = pieces.pop(0)
        section, entry = outline.section(node, raw), outline.entries(node)
        if section is not None and isinstance(raw, dict) and piece in outline.properties(section):
            node, raw = outline.properties(section)[str(piece)], raw.get(str(piece))
        elif entry is not None and isinstance(raw, list) and isinstance(piece, int):
            node, raw = entry, raw[piece]
        else:
            break
        path = (*path, piece)
    return path, node


class _Unreadable(Exception):
    """A rule looked into what is wrong."""


class _Wrong:
    """In place of a section that is wrong: a rule sees that it is there, and no more."""

    def __getattr__(self, name: str) -> object:
        raise _Unreadable

    def __str__(self) -> str:
        raise _Unreadable


def _explain_outer_rules(document: Document, wrong: Sequence[KeyPath]) -> None:
    """Try the rules that span several keys, which pydantic skips for a section with anything wrong inside.

    A section of which only inner sections are wrong is validated once more. A rule that looks into one of
    those applies when that is mended.
    """
    for path in sorted({place[:depth] for place in wrong for depth in range(len(place))}, key=len):
        reached, node = _locate(document.tree, path)
        raw = document.value(path)
        section = outline.section(node, raw)
        if reached != path or section is None or not isinstance(raw, dict) or path in wrong:
            continue
        inside = {str(place[len(path)]) for place in wrong if place[: len(path)] == path}
        fields = outline.properties(section)
        if all(outline.section(fields[key], raw.get(key)) for key in inside):
            any_section = Annotated[object, PlainValidator(lambda _: _Wrong())]
            as_they_are = cast(dict[str, Any], {key: (any_section, ...) for key in inside})
            lenient = create_model("Lenient", __base__=outline.class_of(section), **as_they_are)
            try:
                lenient.model_validate_json(json.dumps(raw), strict=True)
            except ValidationError as error:
                for detail in error.errors(include_url=False):
                    if detail["type"] == "value_error":
                        _explain_rule(document, path, node, str(detail["ctx"]["error"]))
            except _Unreadable:
                pass
