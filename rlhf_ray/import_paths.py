"""What a person names by its import path: functions and classes of their own."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from rlhf_ray.errors import ConfigError


def import_named(
    path: str, key: str, noun: str, is_one: Callable[[object], bool], form: str = "module:name"
) -> object:
    """
    Args:
        path: `module:name`. key: of the configuration, for messages.
        noun: what it must be; is_one: whether it is. form: how to write the path.

    Raises:
        ConfigError: `path` is not of that form, or there is no such thing.
    """
    module_name, separator, name = path.partition(":")
    if not separator:
        raise ConfigError(f"{key}={path}: write it as {form}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{key}={path}: cannot import {module_name} ({error})") from error
    found: object = getattr(module, name, None)
    if not is_one(found):
        raise ConfigError(f"{key}={path}: {module_name} has no {noun} {name}")
    return found
