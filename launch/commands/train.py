"""`rlhf-ray train`: the run itself."""

from __future__ import annotations

import argparse
import importlib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from launch.commands.shared import AddCommand, add_config, load
from launch.exit_codes import DONE
from launch.interrupts import stopping_at_once
from rlhf_ray.errors import Interrupted, UserError

if TYPE_CHECKING:
    from rlhf_ray.config.schema import RunConfig


class RunFailed(Exception):
    """A run failed; its cause is the reason. `log` is where the traceback was written."""

    def __init__(self, log: Path) -> None:
        super().__init__(str(log))
        self.log = log


def add(command: AddCommand) -> None:
    train = command("train", _train, "Run a stage, or a pipeline of stages.")
    add_config(train)
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint: resume=auto")


def _train(arguments: argparse.Namespace) -> int:
    with stopping_at_once():
        config = load(arguments, *(["resume=auto"] if arguments.resume else []))
        return _run(config)


def _run(config: RunConfig) -> int:
    run = cast("Callable[[RunConfig], object]", importlib.import_module("launch").run_checked)
    try:
        run(config)
    except (UserError, Interrupted):
        raise
    except Exception as error:
        log = config.output_dir / "logs" / "driver.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
        raise RunFailed(log) from error
    return DONE
