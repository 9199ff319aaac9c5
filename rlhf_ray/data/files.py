"""Rows of one local file, read lazily. What is wrong with a file is said with its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from rlhf_ray.errors import DataError

Row = dict[str, object]

CSV_FIELD_LIMIT = 2**31 - 1
"""Characters. The csv module's own limit of 131,072 is shorter than a long conversation."""


def is_data_file(path: Path) -> bool:
    """Whether the name ends in .jsonl, .json, .csv or .parquet, also with .gz."""
    return _kind(path) in READERS


def read_file(path: Path) -> Iterator[Row]:
    """The rows of a JSONL, JSON (a list of objects), CSV or Parquet file, in order, opened when first asked
    for.

    Raises:
        DataError: the kind is unknown, the file is damaged, or a row of it is not a mapping of columns to
            values.
    """
    if not is_data_file(path):
        raise DataError(
            f"{path}: unknown kind of file; use one of {', '.join(READERS)}, or one of them compressed as .gz"
        )
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is no ordinary file; name one, or a folder of a dataset")
    try:
        with _open(path) as stream:
            yield from READERS[_kind(path)](stream, path)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); compress or download it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _parse_json(content: bytes, where: str) -> object:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(
            f"{where}: not valid JSON, {line}column {error.colno}: {error.msg}; correct or remove it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not usable JSON ({error}); correct or remove it") from error


def _row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: not a table: expected an object with a value a column, found {type(value).__name__}"
        )
    return value


def _read_jsonl(stream: BinaryIO, path: Path) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _row(_parse_json(line, where), where)


def _read_json(stream: BinaryIO, path: Path) -> Iterator[Row]:
    content = _parse_json(stream.read(), str(path))
    if not isinstance(content, list):
        raise DataError(
            f"{path}: not a table: a .json file must hold a list of objects, found {type(content).__name__}; "
            "a file with one object a line is called .jsonl"
        )
    for number, value in enumerate(content, start=1):
        yield _row(value, f"{path}, row {number}")


def _read_csv(stream: BinaryIO, path: Path) -> Iterator[Row]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) != len(names):
            raise DataError(f"{path}, line 1: column names must differ, these do not: {', '.join(names)}")
        for values in reader:
            if values and len(values) != len(names):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(values)} values for {len(names)} columns; "
                    "quote values that hold commas or line breaks"
                )
            if values:
                yield dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, after line {reader.line_num}: not UTF-8 text ({error.reason}); convert the file to "
            "UTF-8"
        ) from error


def _read_parquet(stream: BinaryIO, path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Parquet is read from its end; a gzip stream would be decompressed again at every seek.
    source = io.BytesIO(stream.read()) if path.suffix.lower() == ".gz" else stream
    try:
        for batch in pq.ParquetFile(source).iter_batches():
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


READERS: dict[str, Callable[[BinaryIO, Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
