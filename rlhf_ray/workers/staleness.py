"""How far the weights that sampled are behind those in training."""

from __future__ import annotations

import numpy as np

from rlhf_ray.errors import WeightSyncError
from rlhf_ray.types import Metrics, Rollouts, StepInfo


def check_versions(rollouts: Rollouts, info: StepInfo, max_lag: int) -> None:
    """
    Raises:
        WeightSyncError: a token was sampled by weights of more than `max_lag` versions before
            `info.version`, or by other ones.
    """
    found = np.unique(rollouts.versions.values).astype(np.int64)
    if not np.all((info.version - max_lag <= found) & (found <= info.version)):
        allowed = f" (online.max_lag={max_lag})" if max_lag else ""
        raise WeightSyncError(
            f"step {info.step}: its tokens were sampled by weights of version {', '.join(map(str, found))}, "
            f"and version {info.version} was published last{allowed}; an engine has missed an update"
        )


def lag_metrics(rollouts: Rollouts, info: StepInfo) -> Metrics:
    """In versions, over all tokens."""
    lags = info.version - rollouts.versions.values.astype(np.int64)
    return {"lag/mean": float(lags.mean()), "lag/max": float(lags.max())}
