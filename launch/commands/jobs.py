"""`rlhf-ray jobs`: what runs on a cluster, to look at, follow and stop."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from typing import TYPE_CHECKING

from launch.commands.shared import AddCommand
from launch.exit_codes import DONE
from launch.interrupts import stopping_at_once
from rlhf_ray.errors import Interrupted, UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from launch.submission.client import Jobs

ACTIONS = ("list", "follow", "stop")


def add(command: AddCommand) -> None:
    jobs = command("jobs", _jobs, "List the jobs of a cluster, follow one, or stop it.")
    jobs.add_argument("action", choices=ACTIONS, help="of a cluster, or of the job with that ID")
    jobs.add_argument("job", metavar="ID", nargs="?")
    add_address(jobs)


def add_address(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--address",
        required=True,
        metavar="URL",
        help="of the cluster's dashboard, such as http://127.0.0.1:8265",
    )


def note(text: str) -> None:
    """A line about a job; standard output is for its log."""
    print(f"rlhf-ray: {text}", file=sys.stderr, flush=True)


def hints(job_id: str, address: str) -> str:
    return (
        f"follow it with `rlhf-ray jobs follow {job_id} --address {address}`, "
        f"stop it with `rlhf-ray jobs stop {job_id} --address {address}`"
    )


def _jobs(arguments: argparse.Namespace) -> int:
    from launch.submission.client import connect, explained, job_of

    action, job_id, address = arguments.action, arguments.job, arguments.address
    if action == "list" and job_id is not None:
        raise UserError(f"jobs list: what is {job_id} for? see rlhf-ray jobs --help")
    if action != "list" and job_id is None:
        raise UserError(f"jobs {action}: of which job? `rlhf-ray jobs list --address {address}` shows all")
    client = connect(address)
    if action == "list":
        with explained(address):
            print(_listing(client.list_jobs()))
        return DONE
    details = job_of(client, address, job_id)
    if action == "follow":
        return follow_job(client, address, job_id)
    if details.status.is_terminal():
        note(f"{job_id} is over: {details.status.value.lower()}")
        return DONE
    with explained(address):
        client.stop_job(job_id)
    note(f"{job_id} finishes its step, saves, and stops; follow it to see")
    return DONE


def follow_job(client: Jobs, address: str, job_id: str) -> int:
    """Show the log of a job until it is over; its exit code.

    Raises:
        Interrupted: Ctrl-C or SIGTERM here, which the job does not notice.
    """
    from launch.submission.client import explained
    from launch.submission.following import ending, exit_code, follow

    try:
        with stopping_at_once(), explained(address):
            details = follow(client, job_id, _show, note)
    except KeyboardInterrupt:
        raise Interrupted(f"no longer following; {job_id} goes on: {hints(job_id, address)}") from None
    note(f"{job_id}: {ending(details)}")
    return exit_code(details)


def _show(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has left: `… | head`
        raise KeyboardInterrupt from None


def _listing(jobs: list[JobDetails]) -> str:
    """A line a job, the newest last; other people's jobs too."""
    rows = [("ID", "STATUS", "STARTED", "WRITES TO")]
    for job in sorted(jobs, key=lambda job: job.start_time or 0):
        if job.submission_id is not None:
            started = datetime.fromtimestamp((job.start_time or 0) / 1000)
            wrote = (job.metadata or {}).get("output_dir", "-")
            rows.append((job.submission_id, job.status.value, f"{started:%Y-%m-%d %H:%M:%S}", wrote))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]])
        for row in rows
    )
