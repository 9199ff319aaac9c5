"""Following a job through lost connections: no line is lost or shown twice, and the result is the job's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from launch.submission.following import Patience, ending, exit_code, follow
from rlhf_ray.errors import RlhfRayError

QUICK = Patience(silence=0.02, first_pause=0.001, longest_pause=0.002, limit=0.2)
LOG = "one\ntwo\nthree\n"


def job(status: JobStatus, code: int | None = None, message: str | None = None) -> JobDetails:
    return JobDetails(
        type=JobType.SUBMISSION, status=status, entrypoint="x", driver_exit_code=code, message=message
    )


class Server:
    """A Jobs server of which every connection ends after some pieces of the log.

    Args:
        cuts: of each connection: how many characters it sends before it ends, and how it ends.
        pieces: characters sent at a time. unreachable: how many requests fail at first.
    """

    def __init__(
        self, cuts: list[tuple[int, Exception | None]], piece: int = 3, unreachable: int = 0
    ) -> None:
        self.cuts, self.piece, self.unreachable = cuts, piece, unreachable
        self.connections = 0
        self.questions = 0
        self.silent_for = 0.0

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.connections += 1
        length, ending = self.cuts[min(self.connections, len(self.cuts)) - 1]
        for start in range(0, length, self.piece):
            yield LOG[start : min(start + self.piece, length)]
        await asyncio.sleep(self.silent_for)
        if ending is not None:
            raise ending

    def get_job_info(self, job_id: str) -> JobDetails:
        self.questions += 1
        if self.questions <= self.unreachable:
            raise ConnectionError("refused")
        is_over = self.connections >= len(self.cuts)
        return job(JobStatus.SUCCEEDED if is_over else JobStatus.RUNNING, 0 if is_over else None)

    def get_job_logs(self, job_id: str) -> str:
        return LOG

    def submit_job(self, *, entrypoint: str, **options: object) -> str:
        raise NotImplementedError

    def list_jobs(self) -> list[JobDetails]:
        raise NotImplementedError

    def stop_job(self, job_id: str) -> bool:
        raise NotImplementedError


def followed(server: Server) -> tuple[str, list[str], JobDetails]:
    shown: list[str] = []
    notices: list[str] = []
    details = follow(server, "job", shown.append, notices.append, QUICK)
    return "".join(shown), notices, details


@pytest.mark.parametrize("piece", [1, 3, 100])
def test_every_line_once_however_the_connections_end(piece: int) -> None:
    dropped = RuntimeError("WebSocket connection closed unexpectedly")
    server = Server([(4, dropped), (2, ConnectionError()), (9, None), (len(LOG), None)], piece)
    shown, notices, details = followed(server)
    assert shown == LOG
    assert server.connections == 4
    assert [note.partition(";")[0] for note in notices] == [
        "connection lost (RuntimeError)",
        "connection lost (ConnectionError)",
    ]
    assert exit_code(details) == 0


def test_what_is_written_after_the_connection_ended_is_shown() -> None:
    shown, _, _ = followed(Server([(5, None)]))
    assert shown == LOG


def test_a_silent_log_is_asked_about() -> None:
    server = Server([(len(LOG), None)])
    server.silent_for = 0.15
    shown, notices, _ = followed(server)
    assert (shown, notices) == (LOG, [])
    assert server.questions > 2


def test_a_connection_that_died_silently_is_made_anew() -> None:
    server = Server([(4, None), (len(LOG), None)], unreachable=1)
    server.silent_for = 0.1
    shown, notices, _ = followed(server)
    assert shown == LOG
    assert notices[0].startswith("connection lost (ConnectionError)")


def test_a_server_that_stays_away_is_given_up() -> None:
    server = Server([(0, ConnectionError())], unreachable=10**9)
    with pytest.raises(RlhfRayError, match="has not answered for 0 s; job job may go on"):
        followed(server)


@pytest.mark.parametrize(
    ("status", "code", "result", "words"),
    [
        (JobStatus.SUCCEEDED, 0, 0, "done"),
        (JobStatus.FAILED, 1, 1, "failed: its driver ended with 1"),
        (JobStatus.FAILED, 2, 2, "refused"),
        (JobStatus.FAILED, 130, 130, "interrupted, after saving"),
        (JobStatus.FAILED, 137, 1, "failed: its driver ended with 137"),
        (JobStatus.FAILED, -9, 1, "failed: its driver ended with -9"),
        (JobStatus.FAILED, None, 1, "failed before its driver ended: no node"),
        (JobStatus.STOPPED, None, 130, "stopped"),
    ],
)
def test_the_result_is_the_drivers(status: JobStatus, code: int | None, result: int, words: str) -> None:
    details = job(status, code, "no node")
    assert exit_code(details) == result
    assert ending(details).startswith(words)
