"""The cluster's Jobs server, over HTTP: address, token, and errors for people."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from rlhf_ray.errors import UserError

REQUEST_SECONDS = 60.0
"""A server that says nothing for so long is gone. Ray itself would wait for ever."""

_OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Ray prefers these to the address that it is given."""


class Jobs(Protocol):
    """What is used of Ray's client."""

    def submit_job(self, *, entrypoint: str, **options: Any) -> str: ...
    def get_job_info(self, job_id: str) -> JobDetails: ...
    def get_job_logs(self, job_id: str) -> str: ...
    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...
    def list_jobs(self) -> list[JobDetails]: ...
    def stop_job(self, job_id: str) -> bool: ...


class _Client(JobSubmissionClient):
    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=REQUEST_SECONDS, **options)


def connect(address: str) -> Jobs:
    """
    Args:
        address: of the dashboard, http://host:8265.

    Raises:
        UserError: nobody answers there, or the token is not the right one.
    """
    url = address if "://" in address else f"http://{address}"
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--address {address}: write the dashboard's address, such as http://127.0.0.1:8265")
    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
    with explained(address), _without(_OVERRIDING):
        return cast(Jobs, _Client(url, headers=_authorisation(os.environ)))


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Errors of the connection, in words that a person can act on."""
    try:
        yield
    except AuthenticationError as error:
        raise UserError(
            f"--address {address}: the cluster asks for its token, and {_refused(os.environ)}; set "
            "RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it (`ray get-auth-token` on the cluster "
            "shows it)"
        ) from error
    except RuntimeError as error:
        raise UserError(f"--address {address}: the cluster refused: {error}{_remedy(str(error))}") from error
    except (OSError, ValueError) as error:  # requests' own errors are among them
        raise UserError(
            f"--address {address}: no Ray dashboard answers there; is the cluster up, and was it started "
            "with the dashboard (`ray start --head`)?"
        ) from error


def _remedy(refusal: str) -> str:
    if "No available agent" not in refusal:
        return ""
    return (
        ". The head's agent is not up yet, or another Ray on that machine holds its port; end that one, or "
        "start the head with --dashboard-agent-listen-port=52399"
    )


def job_of(client: Jobs, address: str, job_id: str) -> JobDetails:
    """
    Raises:
        UserError: the cluster does not know the job.
    """
    with explained(address):
        try:
            return client.get_job_info(job_id)
        except RuntimeError as error:
            raise UserError(
                f"no job {job_id} on {address}; `rlhf-ray jobs list --address {address}` shows all"
            ) from error


def _authorisation(environment: Mapping[str, str]) -> dict[str, str]:
    """The token that Ray's own tools would send, from where they look for it."""
    token = None if environment.get("RAY_AUTH_MODE", "").lower() == "disabled" else _token(environment)
    return {"Authorization": f"Bearer {token}"} if token else {}


def _token(environment: Mapping[str, str]) -> str | None:
    if environment.get("RAY_AUTH_TOKEN"):
        return environment["RAY_AUTH_TOKEN"].strip()
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        if named:
            raise UserError(f"RAY_AUTH_TOKEN_PATH={named}: cannot be read") from None
        return None


def _refused(environment: Mapping[str, str]) -> str:
    return "refuses the one that was sent" if _authorisation(environment) else "none was found here"


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Without these variables in the environment."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
