"""The commands of `rlhf-ray`, one module each, in the order in which `--help` lists them.

A module has `add`, which is given a function that makes a command. Modules are imported to show the help, so
whatever is heavy is imported where a command runs.
"""

from __future__ import annotations

from launch.commands import bench, check, cluster, doctor, generate, jobs, plan, report, submit, train

COMMANDS = (train, check, plan, submit, jobs, cluster, doctor, generate, report, bench)
