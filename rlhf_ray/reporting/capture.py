"""Keeps the chatter of libraries out of the display: it goes to a file, the display to the terminal."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_QUIET_ENVIRONMENT = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


@contextmanager
def capture_library_output(log_path: Path) -> Iterator[TextIO]:
    """Sends all that this process and its children print to `log_path`; yields the real stdout.

    That covers `print`, `logging`, warnings, and what native code writes: it is the file descriptors that are
    redirected, not only Python's streams. Progress bars of tqdm and of the Hugging Face libraries are off.
    Everything is as before when the block ends, however it ends.

    Args:
        log_path: appended to, so that a resumed run keeps its history.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with (
        log_path.open("a", encoding="utf-8", buffering=1) as log,
        _real_stdout() as terminal,
        _descriptors_to(log.fileno()),
        _streams_to(log),
        _logging_to(log),
        _environment(_QUIET_ENVIRONMENT),
    ):
        yield terminal


@contextmanager
def _real_stdout() -> Iterator[TextIO]:
    """A copy of descriptor 1 as it is now; in a notebook, whose stdout is no descriptor, stdout itself."""
    original = sys.__stdout__
    if original is None or sys.stdout is not original:
        yield sys.stdout
        return
    original.flush()
    copy = os.dup(original.fileno())
    with open(copy, "w", encoding=original.encoding, errors=original.errors, buffering=1) as terminal:
        yield terminal


@contextmanager
def _descriptors_to(log: int) -> Iterator[None]:
    saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    _flush_streams()
    for descriptor in saved:
        os.dup2(log, descriptor)
    try:
        yield
    finally:
        _flush_streams()
        for descriptor, original in saved.items():
            os.dup2(original, descriptor)
            os.close(original)


@contextmanager
def _streams_to(log: TextIO) -> Iterator[None]:
    saved = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = log
    try:
        yield
    finally:
        sys.stdout, sys.stderr = saved


@contextmanager
def _logging_to(log: TextIO) -> Iterator[None]:
    handler = logging.StreamHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.setLevel(level)
        root.removeHandler(handler)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    saved = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _flush_streams() -> None:
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.flush()
