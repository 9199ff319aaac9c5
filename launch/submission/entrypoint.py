"""What a job runs on the head node: `rlhf-ray train`, taken up again if it dies.

    python -m launch.submission.entrypoint [--environment MODULE] [--max-retries N] -- train CONFIG …

Ray starts the command of a job once. A driver that was killed, or a run that failed, is started again here,
and goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from launch.exit_codes import DONE, INTERRUPTED, WRONG_INPUT
from launch.submission.secrets import unseal

FINAL = (DONE, WRONG_INPUT, INTERRUPTED)
"""Exit codes after which trying again is of no use, or not wanted."""

Start = Callable[[Sequence[str], Mapping[str, str]], int]
"""Runs a command with an environment, and returns its exit code; minus the signal that killed it."""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.submission.entrypoint")
    parser.add_argument("--environment", metavar="MODULE")
    parser.add_argument("--max-retries", type=int, default=0)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args(words)
    environment = dict(os.environ)
    if arguments.environment:
        unseal(arguments.environment, environment)
    stops: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        # Ray stops a job by a signal to each of its processes: the run saves, and this one waits for it.
        signal.signal(number, lambda sent, _: stops.append(sent))
    return persist(arguments.command, environment, arguments.max_retries, lambda: bool(stops), run)


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    return subprocess.Popen([sys.executable, "-m", "launch", *command], env=environment).wait()


def persist(
    command: Sequence[str],
    environment: Mapping[str, str],
    max_retries: int,
    is_stopped: Callable[[], bool],
    start: Start,
) -> int:
    """Run until it ends for good, or has been taken up again `max_retries` times; its exit code."""
    code = INTERRUPTED
    for retry in range(max_retries + 1):
        if is_stopped():
            break
        if retry:
            ended = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
            print(
                f"rlhf-ray: the driver {ended}; going on from its last checkpoint "
                f"(retry {retry} of {max_retries})",
                flush=True,
            )
        code = start([*command, "resume=auto"] if retry else command, environment)
        if code in FINAL:
            break
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
