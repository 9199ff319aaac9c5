"""When a run is saved, what of it is kept, and when it ends by itself."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Literal

from pydantic import Field, field_validator

from rlhf_ray.config.schema.base import Positive, Section

_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(r"(?=\d)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", re.ASCII)


class KeepBestSection(Section):
    """A step whose metric is better than ever is saved, whatever `every` says, and kept until a better one
    comes. Its model is `best/` beside `model/` when the stage is done."""

    metric: str = Field(min_length=1, description="a metric of the steps, such as eval/reward/proxy")
    mode: Literal["max", "min"] = "max"


class CheckpointSection(Section):
    """every: optimizer or RL steps between checkpoints of a stage; null saves only on Ctrl-C.
    deadline: when the run stops as by Ctrl-C, saved, for schedulers with a time limit: a duration from its
    start (`3h50m`, `90m`), or a time of day on a date, by this machine's clock (`2030-01-31T18:30`). The step
    under way is finished first, so leave time for a step and for saving.
    """

    every: Positive | None = 50
    keep_last: Positive = 1
    keep_best: KeepBestSection | None = None
    deadline: str | None = None

    @field_validator("deadline")
    @classmethod
    def _is_a_time(cls, deadline: str | None) -> str | None:
        if deadline is not None:
            try:
                seconds_left(deadline, datetime.now())
            except (ValueError, OverflowError):
                raise ValueError(
                    "must be a duration such as 3h50m or 45m, or a time such as 2030-01-31T18:30"
                ) from None
        return deadline


def seconds_left(deadline: str, now: datetime) -> float:
    """Until a `checkpoint.deadline`, where the run starts `now`; 0 or less where it has passed.

    Raises:
        ValueError: it is neither a duration nor a time.
    """
    if found := _DURATION.fullmatch(deadline):
        numbers = zip(found.groups(default="0"), _SECONDS.values(), strict=True)
        return sum(float(number) * seconds for number, seconds in numbers)
    moment = datetime.fromisoformat(deadline)
    return (moment.astimezone() - now.astimezone()).total_seconds()
