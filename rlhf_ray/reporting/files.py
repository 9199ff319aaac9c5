"""Writing files so that a reader never sees half of one, and JSON that every parser accepts."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from rlhf_ray.errors import DataError, DiskFullError

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; it is then flushed to the disk and takes the place of `path`.

    When the block raises, `path` stays as it was and the unfinished file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    # The rename itself is durable only once the folder is.
    sync(path.parent)


def sync(path: Path) -> None:
    """What is in the file is on the disk when this returns; of a folder, its list of names."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_tree(folder: Path) -> None:
    """The folder and all that is in it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def free_space(folder: Path) -> int:
    """Bytes that a file in an existing folder may still take, as far as the file system says."""
    return shutil.disk_usage(folder).free


def shown_size(size: float) -> str:
    """`1.5 GB`"""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_IN_NATIVE_WORDS = ("unexpected pos", "file write failed", "failed writing", *map(os.strerror, _FULL))
"""How torch and safetensors say that a file could not be written; neither passes on the system's number."""


@contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """
    Raises:
        DiskFullError: something in the block could not be written, since the disk or a quota is full.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in _FULL or any(words in str(error) for words in _FULL_IN_NATIVE_WORDS):
            reason = str(error).strip().splitlines()[0]
            raise DiskFullError(f"{folder}: the disk, or a quota on it, is full ({reason})") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write aside, then rename."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def to_json(value: object) -> Json:
    """`value` in JSON's types: NaN and infinities become null, paths strings, numpy's scalars Python's."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [to_json(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON: {value!r}")


def nan_for_null(value: Json) -> Json:
    """The inverse of `to_json` for numbers: null becomes NaN."""
    if isinstance(value, dict):
        return {key: nan_for_null(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [nan_for_null(entry) for entry in value]
    return math.nan if value is None else value


def dump_line(value: object) -> str:
    """One line of a JSONL file, with its line end."""
    return json.dumps(to_json(value), ensure_ascii=False, allow_nan=False) + "\n"


def read_lines(path: Path) -> list[dict[str, Json]]:
    """The objects of a JSONL file.

    A last line without its line end is what a killed process leaves behind, and is left out.

    Raises:
        DataError: the file is missing, or a whole line is not a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give a file that a run wrote") from None
    whole = text[: text.rfind("\n") + 1]
    return [_parse_object(path, number, line) for number, line in enumerate(whole.split("\n")[:-1], start=1)]


def _parse_object(path: Path, number: int, line: str) -> dict[str, Json]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not JSON ({error.msg}); remove the line") from None
    if not isinstance(entry, dict):
        raise DataError(f"{path}:{number}: {type(entry).__name__} instead of an object; remove the line")
    return entry
