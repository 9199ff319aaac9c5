"""Sources of reward of the online stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf_ray.config.schema.base import Section


class ModelReward(Section):
    """A trained reward model; without a path, the one that this pipeline's `reward` stage made."""

    type: Literal["model"]
    name: str = "proxy"
    path: str | None = None
    weight: float = 1.0


class FunctionReward(Section):
    """A Python function `f(prompts, completions, **columns) -> list[float | None]` by import path
    `module:name`.

    With weight 0 it is computed and shown, and not trained on: a gold score beside the proxy.
    """

    type: Literal["function"]
    name: str
    function: str
    weight: float = 1.0


Reward = Annotated[ModelReward | FunctionReward, Field(discriminator="type")]
