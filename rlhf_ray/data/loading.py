"""From a dataset section of the configuration to rows in memory."""

from __future__ import annotations

import difflib
import hashlib
import importlib.resources
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np

from rlhf_ray.config.schema import DatasetSection
from rlhf_ray.data.files import Row, is_data_file, read_file
from rlhf_ray.data.reasoning_gym import PREFIX as REASONING_GYM
from rlhf_ray.data.reasoning_gym import read_reasoning_gym
from rlhf_ray.errors import DataError

EMBEDDED = "embedded:"
EMBEDDED_NAMES = ("demonstrations", "guess", "prompts", "red-team")
MADE = (EMBEDDED, REASONING_GYM)
"""Beginnings of paths that name no file."""
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Table:
    """Rows of one dataset.

    Fields:
        rows: a value a column; a row may lack columns that others have.
        positions: place of each row in its source, from 0, whatever `limit` and the seed are.
        source: `path` as the configuration names it, with the split where there are several.
        fingerprint: SHA-256 of the whole split's content, before `limit`; the same for a file and its
            compressed copy.
    """

    rows: list[Row]
    positions: list[int]
    source: str
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """Names of all columns, in order of appearance."""
        return columns_of(self.rows)


def columns_of(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def load_rows(section: DatasetSection, seed: int) -> Table:
    """Read a dataset: all rows in their order, or, with `limit`, the first rows after shuffling by `seed`.

    A local file is one split, "train"; to evaluate on other rows, name another file. The embedded datasets
    and the tasks of reasoning_gym have the splits "train" and "test"; folders and hub names have those that
    the `datasets` library finds.

    Raises:
        DataError: missing, unreadable, damaged, not a table, empty, or without that split.
    """
    rows = list(_read(section, seed))
    source = section.path if _is_file(section) else f"{section.path} ({section.split})"
    if not rows:
        raise DataError(f"dataset.path={section.path}: has no rows in split '{section.split}'")
    positions = list(range(len(rows)))
    if section.limit is not None:
        positions = np.random.default_rng(seed).permutation(len(rows))[: section.limit].tolist()
    return Table([rows[position] for position in positions], positions, source, _fingerprint(rows))


def first_rows(section: DatasetSection, count: int) -> list[Row] | None:
    """The first rows, reading as little as the format allows; None for a hub name, which needs the network.

    Raises:
        DataError: as `load_rows`, as far as these rows show it.
    """
    if _is_hub_name(section):
        return None
    if section.path.startswith(REASONING_GYM):
        count = 1  # all have the same columns, and some tasks take a second a row
    rows = list(islice(_read(section, seed=0), count))
    if not rows:
        raise DataError(f"dataset.path={section.path}: has no rows in split '{section.split}'")
    return rows


def _read(section: DatasetSection, seed: int) -> Iterator[Row]:
    if section.path.startswith(REASONING_GYM):
        _refuse_name(section)
        return read_reasoning_gym(section, seed)
    _refuse_options(section)
    if section.path.startswith(EMBEDDED):
        return _read_embedded(section)
    path = _local(section)
    if _is_hub_name(section):
        return _read_hub(section)
    if path.is_dir():
        _refuse_name(section)
        return _read_folder(section, path)
    if not path.exists():
        _missing(section, path)
    if section.split != "train":
        raise DataError(
            f"dataset.split={section.split}: the file {section.path} is one split, 'train'; put the other "
            "rows into a file of their own and name it in path"
        )
    _refuse_name(section)
    return read_file(path)


def _local(section: DatasetSection) -> Path:
    if not section.path.strip() or "\0" in section.path:
        raise DataError(f"dataset.path={section.path!r}: not a path; name a file, a folder or a hub dataset")
    try:
        return Path(section.path).expanduser()
    except RuntimeError as error:
        raise DataError(f"dataset.path={section.path}: {error}; write the path in full") from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise DataError(f"dataset.path={path}: cannot be read: {error.strerror}") from error


def _is_hub_name(section: DatasetSection) -> bool:
    if section.path.startswith(MADE):
        return False
    path = _local(section)
    return not _exists(path) and not is_data_file(path) and HUB_NAME.fullmatch(section.path) is not None


def _is_file(section: DatasetSection) -> bool:
    return not section.path.startswith(MADE) and _local(section).is_file()


def _refuse_name(section: DatasetSection) -> None:
    if section.name is not None:
        raise DataError(
            f"dataset.name={section.name}: only hub datasets have configurations, and {section.path} is "
            "local; remove name"
        )


def _refuse_options(section: DatasetSection) -> None:
    for key in ("options", "prompt_suffix"):
        if value := getattr(section, key):
            raise DataError(
                f"dataset.{key}={value}: belongs to datasets of {REASONING_GYM}TASK; remove {key}"
            )


def _missing(section: DatasetSection, path: Path) -> NoReturn:
    parent = path.parent
    if not parent.is_dir():
        raise DataError(
            f"dataset.path={section.path}: no such file, and no folder {parent}; correct the path"
        )
    siblings = os.listdir(parent) if os.access(parent, os.R_OK) else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    remedy = f"did you mean {parent / near[0]}?" if near else "correct the path"
    raise DataError(f"dataset.path={section.path}: no such file; {remedy}")


def _read_embedded(section: DatasetSection) -> Iterator[Row]:
    _refuse_name(section)
    name = section.path.removeprefix(EMBEDDED)
    if name not in EMBEDDED_NAMES:
        near = difflib.get_close_matches(name, EMBEDDED_NAMES, n=1) or EMBEDDED_NAMES
        raise DataError(
            f"dataset.path={section.path}: no such embedded dataset; use "
            + " or ".join(EMBEDDED + known for known in near)
        )
    resource = importlib.resources.files("rlhf_ray.data") / "embedded" / f"{name}.jsonl"
    with importlib.resources.as_file(resource) as path:
        rows = list(read_file(path))
    splits = sorted({str(row["split"]) for row in rows})
    if section.split not in splits:
        raise DataError(
            f"dataset.split={section.split}: {section.path} has the splits {' and '.join(splits)}; use one "
            "of them"
        )
    return ({k: v for k, v in row.items() if k != "split"} for row in rows if row["split"] == section.split)


def _read_folder(section: DatasetSection, folder: Path) -> Iterator[Row]:
    import datasets

    datasets.utils.logging.disable_progress_bar()
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _read_hub(section.model_copy(update={"path": str(folder)}))
    # Written by `save_to_disk`, which `load_dataset` refuses.
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # what the library does with files that it did not write
        raise DataError(f"dataset.path={section.path}: cannot be read: {error}") from error
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if section.split not in splits:
        raise DataError(
            f"dataset.split={section.split}: {section.path} has the splits {', '.join(splits)}; use one of "
            "them"
        )
    return iter(splits[section.split])


def _read_hub(section: DatasetSection) -> Iterator[Row]:
    import datasets

    datasets.utils.logging.disable_progress_bar()
    try:
        return iter(datasets.load_dataset(section.path, section.name, split=section.split))
    except OSError as error:
        raise DataError(
            f"dataset.path={section.path}: neither a local file or folder with data, nor a hub dataset that "
            f"can be reached: {error}"
        ) from error
    except Exception as error:  # what the library makes of a folder may be anything
        raise DataError(
            # A damaged file of the dataset is named by the cause of the error, not by the error.
            f"dataset.path={section.path}, split={section.split}, name={section.name}: "
            f"{error.__cause__ or error}"
        ) from error


def _fingerprint(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        # Dates, bytes and the like, which JSON lacks, are written as Python shows them.
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode("ascii") + b"\n")
    return digest.hexdigest()
