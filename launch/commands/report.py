"""`rlhf-ray report`: the closing table of a run, again."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.commands.shared import AddCommand
from launch.exit_codes import DONE


def add(command: AddCommand) -> None:
    report = command("report", _report, "Show the closing table of a run again.")
    report.add_argument("run", metavar="RUN", type=Path, help="the run's output_dir")


def _report(arguments: argparse.Namespace) -> int:
    from rlhf_ray.reporting.summary import render_run

    render_run(arguments.run)
    return DONE
