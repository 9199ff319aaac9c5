"""The files of this machine that a configuration names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, SecretStr

from rlhf_ray.config.document import KeyPath, dotted
from rlhf_ray.config.schema import RunConfig

MIB = 1 << 20
FILE_LIMIT = 50 * MIB
"""Bytes of what one key names. Larger things are read from shared storage or the hub."""

_KEYS = {"path", "paths", "chat_template", "principles", "template"}
_HERE = ".rlhf-ray/data"


@dataclass(frozen=True)
class NamedFile:
    """
    Fields:
        key: where the configuration names it. value: as written there.
        source: the file or folder here. target: its path in the job's working directory; an absolute one
            stays where it is, on storage that the cluster sees.
    """

    key: KeyPath
    value: str
    source: Path
    target: Path

    @property
    def override(self) -> str:
        """`key.path=value` for the job's own reading of the configuration."""
        text = self.target.as_posix()
        plain = re.fullmatch(r"[\w./-]+", text)
        return f"{dotted(self.key)}={text if plain else _quoted(text)}"

    def contents(self) -> Iterator[tuple[Path, Path]]:
        """(file here, path in the package) of each file."""
        if self.source.is_file():
            yield self.source, self.target
            return
        for file in sorted(path for path in self.source.rglob("*") if path.is_file()):
            yield file, self.target / file.relative_to(self.source)

    @property
    def size(self) -> int:
        return sum(file.stat().st_size for file, _ in self.contents())


def _quoted(text: str) -> str:
    """Single quotes keep any text as it is."""
    return "'" + text.replace("'", "''") + "'"


def named_files(config: RunConfig, code: Path | None, shared: Sequence[Path]) -> list[NamedFile]:
    """Every file and folder of this machine that the configuration names, and where a job finds it.

    Args:
        code: the folder that is packaged, in which things keep their places.
        shared: folders that every node of the cluster sees under the same path.
    """
    found: dict[Path, Path] = {}
    named = []
    for key, value in _texts(config, ()):
        source = Path(os.path.abspath(os.path.expanduser(value)))
        if not os.path.exists(source) or value.startswith("embedded:"):
            continue
        if source not in found:
            found[source] = _target(source, len(found), code, shared)
        named.append(NamedFile(key, value, source, found[source]))
    return named


def _target(source: Path, number: int, code: Path | None, shared: Sequence[Path]) -> Path:
    if any(source.is_relative_to(folder) for folder in shared):
        return source
    if code is not None and source.is_relative_to(code) and source != code:
        return source.relative_to(code)
    return Path(_HERE, str(number), source.name)


def size_mistakes(named: Sequence[NamedFile]) -> list[str]:
    """What is too large to go with a job, one sentence each."""
    mistakes = []
    for file in named:
        if not file.target.is_absolute() and file.size > FILE_LIMIT:
            mistakes.append(
                f"{dotted(file.key)}={file.value}: has {file.size / MIB:.0f} MiB, and at most "
                f"{FILE_LIMIT // MIB} MiB go with a job; put it on storage that every node sees and name "
                "that folder with --shared, or put it on the hub"
            )
    return mistakes


def secret_keys(config: BaseModel, path: KeyPath = ()) -> Iterator[str]:
    """Keys with a secret in them."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, SecretStr):
            yield dotted((*path, name))
        elif isinstance(value, BaseModel):
            yield from secret_keys(value, (*path, name))


def _texts(value: object, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Every text that may name a file, with its key path."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _texts(getattr(value, name), (*path, name))
    elif isinstance(value, tuple):
        for number, entry in enumerate(value):
            yield from _texts(entry, (*path, number))
    elif isinstance(value, str) and any(piece in _KEYS for piece in path[-2:]):
        yield path, value
