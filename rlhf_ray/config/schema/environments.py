"""Episodes of several turns in the online stage."""

from __future__ import annotations

from pydantic import Field, JsonValue

from rlhf_ray.config.schema.base import Positive, Section


class EnvironmentSection(Section):
    """A class that replies to the policy's answers (docs/environments.md).

    class_path: `module:Class`, with the methods `reset` and `step`.
    max_episode_length: tokens after the prompt, answers and observations together. A turn that might not fit,
    with an answer of max_completion_length, is not begun.
    timeout: seconds for one call of `reset` or `step`; an episode whose environment takes longer, or raises,
    is not trained on.
    """

    class_path: str
    options: dict[str, JsonValue] = Field({}, description="keyword arguments of the class")
    max_turns: Positive = 4
    max_episode_length: Positive = 512
    timeout: float = Field(30.0, gt=0)
    num_threads: Positive = Field(16, description="calls of an engine's environments that run at a time")
