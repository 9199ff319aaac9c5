"""`rlhf-ray doctor`: what this machine has."""

from __future__ import annotations

import argparse

from launch.commands.shared import AddCommand


def add(command: AddCommand) -> None:
    command("doctor", _doctor, "Say what this machine has, and what is missing.")


def _doctor(arguments: argparse.Namespace) -> int:
    from launch.doctor import run_doctor

    return int(run_doctor())
