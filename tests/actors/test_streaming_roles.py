"""Prompts over engines that stream: who gets which."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray

from actors.calls import Turns
from actors.group import ActorGroup, Timeline
from actors.host import AsyncHost
from actors.roles import RemoteStreamingGenerator
from rlhf_ray.types import Prompts, Ragged, SamplingSpec

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_cluster")]


def prompts_of(lengths: list[int], seconds: list[float]) -> Prompts:
    count = len(lengths)
    return Prompts(
        ids=np.arange(count),
        messages=(({"role": "user", "content": "?"},),) * count,
        token_ids=Ragged.from_rows([[1] * length for length in lengths], np.int32),
        columns=tuple({"seconds": each} for each in seconds),
    )


def test_a_prompt_goes_to_the_engine_with_the_least_to_do(tmp_path: Path) -> None:
    hosts = [
        ray.remote(AsyncHost).options(num_cpus=0).remote(f"engine-{rank}", str(tmp_path / f"{rank}.log"))
        for rank in range(2)
    ]
    group = ActorGroup("engine", hosts, Turns(enabled=False), Timeline(), timeout=60.0)
    group.build("benchmarks.sleepers:StreamingSleepingEngine", [{"slots": 1, "sync": 0.0}] * 2, 60.0)
    group.wait_until_built()
    generator = RemoteStreamingGenerator(group)
    sampling = SamplingSpec(max_completion_length=10, num_generations=2)

    def ranks() -> list[int]:
        return [call.task.at for call in generator._outstanding.values()]

    # 220 tokens, then 40, 60 and 100 beside them: the fourth prompt makes both about equal.
    first = generator.generate(prompts_of([100, 10, 20, 40], [0.3, 0.1, 0.1, 30.0]), sampling, 0)
    assert ranks() == [0, 1, 1, 1]
    assert generator.first_done(first, 3) == [0, 1, 2]
    # What is answered counts no longer: the first engine is idle, the other has a hundred tokens.
    generator.generate(prompts_of([10, 10, 10], [30.0] * 3), sampling, 0)
    assert ranks() == [1, 0, 0, 0]
    group.kill()
