"""What the commands have in common: the words for a configuration, how it is read, and numbers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rlhf_ray.config.schema import RunConfig


class AddCommand(Protocol):
    """Makes a command that `handler` runs, and gives its parser; `about` is its line in the help."""

    def __call__(
        self, name: str, handler: Callable[[argparse.Namespace], int], about: str
    ) -> argparse.ArgumentParser: ...


def add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "config", metavar="CONFIG", help="a YAML file, or the name of a packaged configuration"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="changed values, such as online.num_steps=5",
    )


def load(arguments: argparse.Namespace, *more: str, elsewhere: Sequence[Path] = ()) -> RunConfig:
    """The configuration that the words name, checked.

    Args:
        more: overrides that an option stands for.
        elsewhere: folders that the run will see, and this machine need not.

    Raises:
        ConfigError: every mistake, one sentence each.
    """
    from rlhf_ray.config.checks import load_checked

    # Reward functions lie beside the configuration; an installed script does not look there by itself.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return load_checked(arguments.config, [*arguments.overrides, *more], elsewhere)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0")
    return number
