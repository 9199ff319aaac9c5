"""`rlhf-ray submit`: the run as a job of a Ray cluster."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from launch.commands.jobs import add_address, follow_job, hints, note
from launch.commands.shared import AddCommand, add_config, load, not_negative
from launch.exit_codes import DONE


def add(command: AddCommand) -> None:
    submit = command("submit", _submit, "Run on a Ray cluster, as a job of its dashboard's server.")
    add_config(submit)
    add_address(submit)
    submit.add_argument("--no-wait", action="store_true", help="print the job's ID and leave")
    code = submit.add_mutually_exclusive_group()
    code.add_argument(
        "--working-dir",
        type=Path,
        metavar="DIR",
        help="the code to send, and where the job runs; by default this folder",
    )
    code.add_argument("--wheel", type=Path, metavar="FILE", help="send this project as a wheel instead")
    submit.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="files of the folder that stay here"
    )
    submit.add_argument(
        "--shared",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a folder that every node sees under the same path: what is in it is not sent",
    )
    submit.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="an environment variable for the run, from here if no value is given; not shown anywhere",
    )
    submit.add_argument(
        "--max-retries",
        type=not_negative,
        default=0,
        metavar="N",
        help="go on from the last checkpoint so often if the run fails or its driver dies",
    )


def _submit(arguments: argparse.Namespace) -> int:
    from launch.submission.secrets import chosen

    variables = chosen(arguments.env, os.environ)
    shared = tuple(Path(os.path.abspath(folder)) for folder in arguments.shared)
    code = None if arguments.wheel else (arguments.working_dir or Path.cwd())
    if code is not None and code.is_dir():
        # The job finds reward functions where it runs.
        sys.path.insert(0, str(code.resolve()))
    # What the checks look for in the environment, the run will find there too.
    os.environ.update(variables)
    config = load(arguments, elsewhere=shared)

    from launch.submission.client import connect, explained
    from launch.submission.job import Source, prepared, send

    source = Source(
        arguments.config,
        tuple(arguments.overrides),
        code,
        arguments.wheel,
        tuple(arguments.exclude),
        shared,
        arguments.max_retries,
    )
    with prepared(source, config) as job:
        client = connect(arguments.address)
        with explained(arguments.address):
            job_id = send(client, job, variables)
        note(f"submitted as {job_id} ({job.size / (1 << 20):.1f} MiB); writes to {job.output_dir}")
    if arguments.no_wait:
        print(job_id)
        note(hints(job_id, arguments.address))
        return DONE
    return follow_job(client, arguments.address, job_id)
