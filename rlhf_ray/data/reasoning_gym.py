"""Questions made by the tasks of reasoning_gym, as a dataset of prompts: `path: reasoning_gym:TASK`.

A row has the columns that the task's scorer needs: `entry` (question, answer and metadata, as the task made
it) and `task_options`; and `answer`, for rewards that compare texts.
"""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Protocol, cast

from rlhf_ray.config.schema import DatasetSection
from rlhf_ray.data.files import Row
from rlhf_ray.errors import DataError
from rlhf_ray.seeds import derive_seed

PREFIX = "reasoning_gym:"
SPLITS = ("train", "test")
DEFAULT_SIZE = 1000
TEST_SHARE = 4
"""One question in so many belongs to the split `test`."""
ATTEMPTS = 10
"""Questions that are made for each that is wanted, before the task is said to have no more."""
LARGE = 1000
"""An option beyond it may ask for questions that take for ever to make: a number of a million digits, say."""
PATIENCE = 30.0
"""Seconds for the first question where an option is large."""


class Task(Protocol):
    def __getitem__(self, index: int) -> dict[str, object]: ...

    def score_answer(self, answer: str | None, entry: dict[str, object]) -> float: ...


def make_task(name: str, options: Mapping[str, object], seed: int = 0, size: int = 1) -> Task:
    """
    Raises:
        DataError: there is no such task, or it refuses the options.
    """
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {PREFIX}{near[0]}?" if near else f"known are {', '.join(sorted(DATASETS))}"
        raise DataError(f"dataset.path={PREFIX}{name}: reasoning_gym has no such task; {hint}")
    known = set(DATASETS[name][1].__dataclass_fields__) - {"seed", "size"}
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}"
            raise DataError(f"dataset.options={options}: {name} has no option {option}; {hint}")
    try:
        return cast(Task, create_dataset(name, **options, seed=seed, size=size))
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        raise DataError(f"dataset.options={options}: {name} refuses them: {error}") from error


def read_reasoning_gym(section: DatasetSection, seed: int) -> Iterator[Row]:
    """Different questions of the split, at most `limit`; fewer where the task has no more.

    A question belongs to one split by its own text, whatever the seeds and limits of the two are: none of
    `test` is ever in `train`.

    Raises:
        DataError: as `make_task`; there is no such split.
    """
    if section.split not in SPLITS:
        raise DataError(
            f"dataset.split={section.split}: {section.path} has the splits {' and '.join(SPLITS)}; use one "
            "of them"
        )
    wanted = section.limit or DEFAULT_SIZE
    size = ATTEMPTS * wanted
    own_seed = derive_seed(seed, SPLITS.index(section.split))
    _check_pace(section, own_seed)
    task = make_task(section.path.removeprefix(PREFIX), section.options, own_seed, size)
    return _rows(section, task, size, wanted)


def _rows(section: DatasetSection, task: Task, size: int, wanted: int) -> Iterator[Row]:
    seen: set[str] = set()
    for index in range(size):
        try:
            entry = task[index]
        except Exception as error:  # what a task does with options that it let pass
            raise DataError(
                f"dataset.options={section.options}: {section.path} fails with them: {error}; change them"
            ) from error
        question = str(entry["question"])
        if question in seen or split_of(question) != section.split:
            continue
        seen.add(question)
        yield {
            "prompt": question + (section.prompt_suffix or ""),
            "answer": entry["answer"],
            "entry": entry,
            "task_options": dict(section.options),
        }
        if len(seen) == wanted:
            return


def _check_pace(section: DatasetSection, seed: int) -> None:
    """Have a question made in another process: this one could not be interrupted in a long multiplication.

    Raises:
        DataError: it takes too long.
    """
    if not _is_large(section.options):
        return
    made = "import json, sys; from rlhf_ray.data.reasoning_gym import make_task; "
    made += "make_task(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))[0]"
    name, options = section.path.removeprefix(PREFIX), json.dumps(section.options)
    try:
        # Failures are said where the question is made here.
        subprocess.run(
            [sys.executable, "-c", made, name, options, str(seed)],
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DataError(
            f"dataset.options={section.options}: {section.path} takes more than {PATIENCE:g} s for a "
            "question with them; lower them"
        ) from None


def _is_large(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_is_large, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_is_large, value))
    return isinstance(value, int | float) and abs(value) > LARGE


def split_of(question: str) -> str:
    digest = blake2b(question.encode(), digest_size=4).digest()
    return SPLITS[int.from_bytes(digest, "little") % TEST_SHARE == 0]
