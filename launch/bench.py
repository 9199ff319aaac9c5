"""`rlhf-ray bench`: the modules of `benchmarks`, found by name and run with their own options."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.errors import UserError


@dataclass(frozen=True)
class Benchmark:
    """
    Fields:
        module: in `benchmarks`. about: the first line of its docstring.
    """

    module: str
    about: str


def run_benchmark(name: str | None, words: Sequence[str]) -> int:
    """Run a benchmark, or list all where none is named.

    Args:
        words: for the benchmark itself.

    Raises:
        UserError: there is no such benchmark.
    """
    known = benchmarks()
    if name is None:
        print(listing(known))
        return 0
    if name not in known:
        from rlhf_ray.config.document import nearest

        raise UserError(f"no benchmark {name} (there are {', '.join(known) or 'none'}){nearest(name, known)}")
    module = importlib.import_module(f"benchmarks.{known[name].module}")
    return int(module.main(list(words)) or 0)


def listing(known: dict[str, Benchmark]) -> str:
    width = max(map(len, known), default=0) + 2
    lines = [f"  {name:<{width}}{benchmark.about}" for name, benchmark in known.items()]
    return "\n".join(["rlhf-ray bench NAME [OPTIONS]; NAME --help says which options", "", *lines])


def benchmarks() -> dict[str, Benchmark]:
    """Modules that define `main`, by the name of the command (`train-padded` is in `train_padded`, `async` in
    `async_`); they are read, not imported."""
    package = importlib.import_module("benchmarks")
    found = {}
    for each in pkgutil.iter_modules(package.__path__):
        spec = importlib.util.find_spec(f"benchmarks.{each.name}")
        if spec is not None and spec.origin is not None:
            tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
            if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
                about = (ast.get_docstring(tree) or "").partition("\n")[0]
                found[each.name.rstrip("_").replace("_", "-")] = Benchmark(each.name, about)
    return dict(sorted(found.items()))
