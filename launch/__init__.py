"""From a configuration to running roles: the command line, clusters, placement, stages.

`run(config)` is `rlhf-ray train` for Python: the same run, with the metrics coming back as objects.
"""

__all__ = ["run"]


def __getattr__(name: str) -> object:
    # Ray and torch take seconds to import; `rlhf-ray --help` needs neither.
    if name in ("run", "run_checked"):
        from launch import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'launch' has no attribute {name!r}")
