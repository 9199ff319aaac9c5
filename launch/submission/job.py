"""From a checked configuration to a job: command, package and environment."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.submission import package, secrets
from launch.submission.client import Jobs
from launch.submission.named_files import NamedFile, named_files, secret_keys, size_mistakes
from rlhf_ray.config.loading import read_text
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import ConfigError

STOP_SECONDS = 600
"""How long a stopped job may take to finish its step and save; Ray's default is 3."""


@dataclass(frozen=True)
class Source:
    """What a person asked for.

    Fields:
        config: a file, or the name of a packaged configuration. overrides: as given.
        code: the folder to package; None where the cluster has the code, or a wheel brings it.
        wheel: a wheel of this project. excludes: patterns of what stays here.
        shared: folders that all nodes see under the same path. max_retries: of the driver.
    """

    config: str
    overrides: tuple[str, ...]
    code: Path | None
    wheel: Path | None = None
    excludes: tuple[str, ...] = ()
    shared: tuple[Path, ...] = ()
    max_retries: int = 0


@dataclass(frozen=True)
class Job:
    """
    Fields:
        entrypoint: without what is known only when it is sent. package: the zip here.
        output_dir: where the run writes, over there.
    """

    arguments: tuple[str, ...]
    package: Path
    output_dir: str
    size: int
    max_retries: int

    def entrypoint(self, environment: str | None) -> str:
        """The shell's command. Args: environment: module of the sealed variables."""
        words = ["python", "-m", "launch.submission.entrypoint"]
        if environment is not None:
            words += ["--environment", environment]
        if self.max_retries:
            words += ["--max-retries", str(self.max_retries)]
        # Without a shell that waits: signals, and the exit code, are the command's own.
        return f"exec {shlex.join([*words, '--', *self.arguments])}"


@contextmanager
def prepared(source: Source, config: RunConfig) -> Iterator[Job]:
    """Package everything, for the time of the block.

    Raises:
        UserError: something is too large, or a secret would be on display.
    """
    code = source.code.resolve() if source.code else None
    named = named_files(config, code, source.shared)
    mistakes = [*size_mistakes(named), *_secret_mistakes(config)]
    if mistakes:
        raise ConfigError(*mistakes)
    files = package.code_files(code, source.excludes) if code else {}
    for file in named:
        if not file.target.is_absolute():
            files |= {target: path for path, target in file.contents()}
    package.check_size(files, f"the working directory {source.code}" if code else "the package")
    name = (package.OWN_FOLDER / Path(source.config).with_suffix(".yaml").name).as_posix()
    texts = [*(package.wheel_contents(source.wheel) if source.wheel else ())]
    texts.append((name, read_text(source.config).encode()))
    output_dir = os.path.abspath(config.output_dir)
    arguments = ("train", name, *source.overrides, *_rewritten(named), f"output_dir={output_dir}")
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-") as folder:
        path = Path(folder) / "package.zip"
        package.write_package(path, files, texts)
        yield Job(
            (*arguments, "cluster.address=auto"), path, output_dir, path.stat().st_size, source.max_retries
        )


def _rewritten(named: Sequence[NamedFile]) -> list[str]:
    return [file.override for file in named if file.target.as_posix() != file.value]


def _secret_mistakes(config: RunConfig) -> list[str]:
    return [
        f"{key}: would lie in the job's package, and in its command if it is an override; take it out, and "
        "pass it as an environment variable with --env NAME"
        for key in secret_keys(config)
    ]


def send(client: Jobs, job: Job, variables: Mapping[str, str]) -> str:
    """Upload and start the job; its ID."""
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-") as folder:
        runtime_env: dict[str, object] = {
            "working_dir": str(job.package),
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
        }
        module = None
        if variables:
            sealed = secrets.seal(variables, Path(folder))
            module = sealed.name
            runtime_env["py_modules"] = [str(sealed)]
        return client.submit_job(
            entrypoint=job.entrypoint(module),
            runtime_env=runtime_env,
            metadata={"output_dir": job.output_dir, "config": job.arguments[1]},
        )
