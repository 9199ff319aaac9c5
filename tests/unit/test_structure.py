"""The layout, read from the syntax trees: who may import whom, and how long things may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("rlhf_ray", "actors", "launch")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
EVERYTHING = sorted({*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")})
MAX_FILE, MAX_TEST_FILE, MAX_FUNCTION = 400, 500, 60

MAY_IMPORT = {
    "rlhf_ray": {"rlhf_ray"},
    "actors": {"rlhf_ray", "actors", "ray"},
    "launch": {"rlhf_ray", "actors", "launch", "ray", "configs"},
}
"""Of the packages named here; other people's libraries are free unless `ONLY_IN` says otherwise."""

ONLY_IN = {
    "deepspeed": ("rlhf_ray/engines/", "rlhf_ray/weights/source.py"),
    "vllm": ("rlhf_ray/engines/vllm_", "rlhf_ray/weights/"),
}
LIBRARY_LAYERS = {
    # Pure mathematics, and the data that moves: nothing above them.
    "algorithms": {"algorithms", "types", "errors"},
    "types": {"types"},
    "errors": set(),
    "seeds": set(),
    # Loops drive roles that they never build.
    "loops": {
        "loops",
        "roles",
        "algorithms",
        "data",
        "config",
        "reporting",
        "types",
        "errors",
        "seeds",
        "workers",
    },
    "roles": {"types", "reporting"},
    "models": {"models", "config", "types", "errors"},
}
"""Module of the library -> modules of the library that it may import."""


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Full names of the imported modules, wherever the import stands."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def of(path: Path) -> str:
    return relative(path).split("/")[0]


def library_module(name: str) -> str | None:
    """`algorithms` for `rlhf_ray.algorithms.kl`."""
    parts = name.split(".")
    return parts[1] if parts[0] == "rlhf_ray" and len(parts) > 1 else None


def test_the_sources_are_found() -> None:
    assert {of(path) for path in SOURCES} == set(PACKAGES)
    assert len(SOURCES) > 60


def test_imports_run_one_way() -> None:
    ours = {"rlhf_ray", "actors", "launch", "configs", "tests", "benchmarks", "ray"}
    wrong = [
        f"{relative(path)} imports {name}"
        for path in SOURCES
        for name in imports(path)
        if (top := name.split(".")[0]) in ours and top not in MAY_IMPORT[of(path)]
    ]
    assert not wrong


@pytest.mark.parametrize("library", ONLY_IN)
def test_heavy_libraries_are_imported_in_their_engine_only(library: str) -> None:
    wrong = [
        relative(path)
        for path in SOURCES
        if any(name.split(".")[0] == library for name in imports(path))
        and not relative(path).startswith(ONLY_IN[library])
    ]
    assert not wrong


@pytest.mark.parametrize("layer", LIBRARY_LAYERS)
def test_layers_of_the_library(layer: str) -> None:
    allowed = LIBRARY_LAYERS[layer]
    paths = [ROOT / "rlhf_ray" / f"{layer}.py", *(ROOT / "rlhf_ray" / layer).rglob("*.py")]
    wrong = [
        f"{relative(path)} imports {name}"
        for path in paths
        if path.exists()
        for name in imports(path)
        if (module := library_module(name)) is not None and module not in allowed
    ]
    assert not wrong


def test_files_stay_short() -> None:
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in EVERYTHING}
    limits = {name: MAX_TEST_FILE if name.startswith("tests/") else MAX_FILE for name in lengths}
    assert not {name: lines for name, lines in lengths.items() if lines > limits[name]}


def test_functions_stay_short() -> None:
    long = {
        f"{relative(path)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in EVERYTHING
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
        if node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    }
    assert not long


def test_modules_say_what_they_are_for() -> None:
    assert not [relative(path) for path in SOURCES if ast.get_docstring(tree(path)) is None]


PLACES = re.compile(r"(?<![\w.:/~<])/(?:home|root|work|tmp|mnt|opt|Users|data)/\w")


def test_no_absolute_paths() -> None:
    """Of somebody's machine; a path that a user gives is not in the source."""
    wrong = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in EVERYTHING
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if PLACES.search(line)
    ]
    assert not wrong
