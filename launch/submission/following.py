"""Following a job from here: its log as it grows, through lost connections, until its result."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import aiohttp
from ray.job_submission import JobDetails, JobStatus

from launch.exit_codes import DONE, FAILED, INTERRUPTED, WRONG_INPUT
from launch.submission.client import Jobs
from rlhf_ray.errors import RlhfRayError

LOST = (OSError, RuntimeError, aiohttp.ClientError, asyncio.TimeoutError)
"""A connection that is gone, or a server that cannot answer now."""


@dataclass(frozen=True)
class Patience:
    """Seconds.

    Fields:
        silence: of the log, after which the server is asked whether it is still there.
        first_pause, longest_pause: between two attempts to reach it; each is twice the one before.
        limit: without any answer, after which following ends.
    """

    silence: float = 30.0
    first_pause: float = 1.0
    longest_pause: float = 30.0
    limit: float = 600.0


def follow(
    client: Jobs,
    job_id: str,
    show: Callable[[str], None],
    notice: Callable[[str], None],
    patience: Patience | None = None,
) -> JobDetails:
    """Show the log until the job is over.

    Args:
        show: takes the next piece of the log, each piece once. notice: takes a line about the connection.

    Raises:
        RlhfRayError: the cluster did not answer for too long; the job may go on.
    """
    return asyncio.run(_follow(client, job_id, show, notice, patience or Patience()))


async def _follow(
    client: Jobs,
    job_id: str,
    show: Callable[[str], None],
    notice: Callable[[str], None],
    patience: Patience,
) -> JobDetails:
    shown = 0
    pause = patience.first_pause
    answered = time.monotonic()
    while True:
        seen = 0  # the server sends a log from its beginning each time
        try:
            async for text in _lines(client, job_id, patience.silence):
                fresh = text[max(0, shown - seen) :]
                seen += len(text)
                if fresh:
                    show(fresh)
                    shown = seen
            details = await asyncio.to_thread(client.get_job_info, job_id)
            if details.status.is_terminal():
                await _show_rest(client, job_id, shown, show)
                return details
            answered, pause = time.monotonic(), patience.first_pause
        except LOST as error:
            if seen:
                answered, pause = time.monotonic(), patience.first_pause
            if time.monotonic() - answered > patience.limit:
                raise RlhfRayError(
                    f"the cluster has not answered for {patience.limit:.0f} s; job {job_id} may go on"
                ) from error
            notice(f"connection lost ({type(error).__name__}); trying again in {pause:.0f} s")
        await asyncio.sleep(pause)
        pause = min(2 * pause, patience.longest_pause)


async def _lines(client: Jobs, job_id: str, silence: float) -> AsyncIterator[str]:
    """The log from its beginning, until the server ends it. A connection can die without a word: while the
    log says nothing, the server is asked.

    Raises:
        one of LOST.
    """
    log = aiter(client.tail_job_logs(job_id))
    while True:
        coming = asyncio.ensure_future(anext(log))
        try:
            while not (await asyncio.wait({coming}, timeout=silence))[0]:
                await asyncio.to_thread(client.get_job_info, job_id)
            yield coming.result()
        except StopAsyncIteration:
            return
        finally:
            coming.cancel()


async def _show_rest(client: Jobs, job_id: str, shown: int, show: Callable[[str], None]) -> None:
    """What was written after the connection had ended."""
    try:
        rest = (await asyncio.to_thread(client.get_job_logs, job_id))[shown:]
    except LOST:
        return
    if rest:
        show(rest)


def exit_code(details: JobDetails) -> int:
    """Of `rlhf-ray train` over there; 130 where the job was stopped, 1 where its driver was killed."""
    if details.status == JobStatus.SUCCEEDED:
        return DONE
    if details.status == JobStatus.STOPPED:
        return INTERRUPTED
    known = (FAILED, WRONG_INPUT, INTERRUPTED)
    return details.driver_exit_code if details.driver_exit_code in known else FAILED


def ending(details: JobDetails) -> str:
    """How the job ended, in a few words; with Ray's message where there is no log that says why."""
    code = details.driver_exit_code
    if details.status == JobStatus.SUCCEEDED:
        return "done"
    if details.status == JobStatus.STOPPED:
        return "stopped; submit it again with resume=auto to go on"
    if code is None:
        return f"failed before its driver ended: {(details.message or 'no message').strip()}"
    if code == INTERRUPTED:
        return "interrupted, after saving; submit it again with resume=auto to go on"
    if code == WRONG_INPUT:
        return "refused: the input is wrong"
    return f"failed: its driver ended with {code}"
