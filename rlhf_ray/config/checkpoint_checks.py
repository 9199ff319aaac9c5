"""Whether the deadline lies ahead, and whether the metric of `keep_best` will ever be there."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from rlhf_ray.config.document import KeyPath, nearest
from rlhf_ray.config.parts import Parts
from rlhf_ray.config.schema import CheckpointSection, OnlineSection, seconds_left

_REWARD = "eval/reward/"


def checkpoint_mistakes(parts: Parts) -> Iterator[tuple[KeyPath, str]]:
    section = parts.get(CheckpointSection, "checkpoint")
    if section is None:
        return
    if section.deadline is not None and seconds_left(section.deadline, datetime.now()) <= 0:
        yield ("checkpoint", "deadline"), "has passed; give a later one, or null for none"
    if section.keep_best is None or not section.keep_best.metric.startswith("eval/"):
        return
    path, name = ("checkpoint", "keep_best", "metric"), section.keep_best.metric.removeprefix(_REWARD)
    online = parts.get(OnlineSection, "online")
    if name != section.keep_best.metric and online and name not in online.reward_names:
        known = [_REWARD + reward for reward in online.reward_names]
        near = nearest(section.keep_best.metric, known) or f"; it has {', '.join(known)}"
        yield path, f"the online stage has no reward {name}{near}"
    if parts.stages and not any(
        parts.document.value((stage, "eval_every")) is not None for stage in parts.stages
    ):
        yield path, f"nothing is evaluated before the end; set {parts.stages[-1]}.eval_every"
