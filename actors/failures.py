"""How a call failed, in this project's types: was it the work, or what it ran on?"""

from __future__ import annotations

from ray.exceptions import (
    ActorPlacementGroupRemoved,
    ActorUnschedulableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from rlhf_ray.errors import RlhfRayError, WorkerError, WorkerLost

_LOSSES = (
    ActorPlacementGroupRemoved,
    ActorUnschedulableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)


def failure_of(name: str, error: RayError) -> RlhfRayError:
    """
    Args:
        name: of the call.

    Returns:
        What the worker raised where it is one of ours; `WorkerLost` where infrastructure failed; else
        `WorkerError`. Ray's own account is its cause.
    """
    cause = error.cause if isinstance(error, RayTaskError) else error
    failure: RlhfRayError
    if isinstance(cause, RlhfRayError):
        failure = cause
    elif isinstance(cause, RayActorError):
        failure = WorkerLost(f"{name} failed: its process died; its log, and the kernel's, may say why")
    elif isinstance(cause, _LOSSES):
        failure = WorkerLost(f"{name} failed: {type(cause).__name__}: {_first_line(cause)}")
    else:
        failure = WorkerError(f"{name} failed: {type(cause).__name__}: {cause}")
    failure.__cause__ = error
    return failure


def dead_actor(error: RayError) -> str | None:
    """Id of the actor by whose death a call failed: its own, or that of one whose answer it needed."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return cause.actor_id if isinstance(cause, RayActorError) else None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
