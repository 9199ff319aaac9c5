"""`rlhf-ray bench`: the claims of the README, measured."""

from __future__ import annotations

import argparse

from launch.commands.shared import AddCommand


def add(command: AddCommand) -> None:
    bench = command("bench", _bench, "Measure one of the README's claims; without a name, list them.")
    bench.add_argument("name", metavar="NAME", nargs="?")
    bench.add_argument(
        "words", metavar="OPTIONS", nargs=argparse.REMAINDER, help="of the benchmark; see NAME --help"
    )


def _bench(arguments: argparse.Namespace) -> int:
    from launch.bench import run_benchmark

    # --debug is ours wherever it stands; the rest is the benchmark's.
    return run_benchmark(arguments.name, [word for word in arguments.words if word != "--debug"])
