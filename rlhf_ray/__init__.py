"""RLHF for language models: the library. Nothing in this package imports Ray.

The usual entry from Python::

    from rlhf_ray import load_config
    from launch import run

    result = run(load_config("configs/quickstart.yaml", ["online.num_steps=5"]))
    print(result.stages[-1].metrics[-1]["reward/mean"])
"""

from rlhf_ray.errors import ConfigError, DataError, ModelError, RlhfRayError, UserError

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "DataError",
    "ModelError",
    "RlhfRayError",
    "UserError",
    "__version__",
    "load_config",
]


def __getattr__(name: str) -> object:
    # pydantic costs 0.2 s to import: `rlhf-ray --help` does not need it.
    if name == "load_config":
        from rlhf_ray.config.loading import load_config

        return load_config
    raise AttributeError(f"module 'rlhf_ray' has no attribute {name!r}")
