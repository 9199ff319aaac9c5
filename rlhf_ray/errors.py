"""One hierarchy of errors. All of them survive pickling, since they cross Ray's process boundaries.

Two families, told apart by the command line's exit code:

* `UserError`: the input is wrong. The message names file, field, value and remedy; exit code 2, no traceback.
* everything else: the run failed; exit code 1.

Every error is built from strings alone, so `Exception.__reduce__` can rebuild it anywhere.
"""

from __future__ import annotations


class RlhfRayError(Exception):
    """Base of all errors raised on purpose by this project."""


class UserError(RlhfRayError):
    """The user's input is wrong: a message for a person, exit code 2."""


class ConfigError(UserError):
    """One or more mistakes in a configuration.

    Args:
        *mistakes: one sentence each, `file: key.path=value: what is wrong; remedy`.
    """

    @property
    def mistakes(self) -> tuple[str, ...]:
        return tuple(str(mistake) for mistake in self.args)

    def __str__(self) -> str:
        return "\n".join(self.mistakes)


class DataError(UserError):
    """A dataset cannot be read, or a row of it cannot be used."""


class ModelError(UserError):
    """A model folder or file cannot be used (missing tokenizer, no chat template, unknown architecture)."""


class ResourceError(UserError):
    """The cluster does not have what the placement asks for."""


class WorkerError(RlhfRayError):
    """A role failed or did not answer in time; the message names the role, its rank and the call."""


class WorkerLost(WorkerError):
    """Infrastructure, not the work, is to blame: a process died, did not answer, or its machine is gone. The
    same work may succeed elsewhere."""


class GenerationError(RlhfRayError):
    """A generation engine returned something unusable."""


class RewardError(RlhfRayError):
    """A reward function raised or returned the wrong number or kind of values."""


class EnvironmentFailure(RlhfRayError):
    """An environment raised, hung, or answered with something unusable."""


class WeightSyncError(RlhfRayError):
    """The engine does not hold the weights that the trainer published, or their version is unknown."""


class CheckpointError(RlhfRayError):
    """A checkpoint is incomplete or belongs to another run, or could not be written."""


class DiskFullError(CheckpointError):
    """There is no room for a checkpoint; the one before it is whole."""


class Interrupted(RlhfRayError):
    """The person pressed Ctrl-C, or SIGTERM came; the run has saved what it had. Exit code 130."""
