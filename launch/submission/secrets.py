"""Environment variables for a run on a cluster, tokens among them, without their values on display.

Ray shows a job's `runtime_env` to every client of the Jobs API, and writes it into the log of each node's
runtime environment agent; its own `env_vars` are therefore not used. The values go to the head node as a file
of the job's package. The driver reads it, deletes it, keeps the package away from the other nodes, and hands
the values to each actor as an argument, which Ray neither shows nor logs.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from rlhf_ray.errors import RlhfRayError, UserError

PASSED = "RLHF_RAY_PASSED"
"""In the driver's environment: names of the variables that its actors get too."""

_FILE = "environment.json"
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray tells the driver of a job what its actors inherit."""


def chosen(words: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that `--env` names, from here or with their value.

    Args:
        words: NAME, or NAME=VALUE.

    Raises:
        UserError: a name is no name, or is not set here.
    """
    found = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError("--env: write it as NAME, or NAME=VALUE")
        if not separator and name not in environment:
            raise UserError(f"--env {name}: is not set here; set it, or write --env {name}=VALUE")
        found[name] = value if separator else environment[name]
    return found


def seal(variables: Mapping[str, str], folder: Path) -> Path:
    """A module folder with the values, to be uploaded once. Its name is new each time, since Ray keeps
    packages by their content and the driver deletes the file from its copy."""
    module = folder / f"rlhf_ray_environment_{secrets.token_hex(8)}"
    module.mkdir(mode=0o700)
    file = module / _FILE
    file.touch(mode=0o600)
    file.write_text(json.dumps(dict(variables)), encoding="utf-8")
    return module


def unseal(module: str, environment: MutableMapping[str, str]) -> None:
    """On the head node: put the values into the driver's environment and delete the file.

    Raises:
        RlhfRayError: Ray has not unpacked it.
    """
    places = [Path(entry) for entry in sys.path if (Path(entry) / module / _FILE).is_file()]
    if not places:
        raise RlhfRayError(f"{module}: the job's environment variables did not arrive")
    file = places[0] / module / _FILE
    variables = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    environment.update(variables)
    environment[PASSED] = ",".join(variables)
    _keep_from_other_nodes(places[0].name, environment)


def _keep_from_other_nodes(package: str, environment: MutableMapping[str, str]) -> None:
    """Take the package out of what the actors inherit, each node of which would unpack it."""
    written = environment.get(_JOB_CONFIG)
    if written is None:
        return
    config = json.loads(written)
    runtime_env = config.get("runtime_env", {})
    uris = [uri for uri in runtime_env.get("py_modules") or [] if package not in uri]
    runtime_env.pop("py_modules", None)
    if uris:
        runtime_env["py_modules"] = uris
    environment[_JOB_CONFIG] = json.dumps(config)


def passed_on() -> dict[str, str]:
    """The variables that this driver's actors get."""
    names = filter(None, os.environ.get(PASSED, "").split(","))
    return {name: os.environ[name] for name in names if name in os.environ}
