"""How the time of a publication is split, and what of it is set against the floor."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import sync
from benchmarks.paired import Goal, Result
from rlhf_ray.roles import Done, Pending
from rlhf_ray.types import Metrics, Ragged, SFTBatch

PROBE = Ragged.from_rows([np.arange(40), np.arange(30)], np.int32)


class Policy:
    """Takes four seconds to publish, by a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[object] = []

    def train_sft(self, batch: Pending[SFTBatch]) -> Pending[Metrics]:
        self.now += 100.0  # stepping is not part of the time
        self.log.append(batch.result().is_target.values.tolist())
        return Done({})

    def publish(self, version: int, verify: bool) -> Metrics:
        self.now += 4.0
        self.log.append((version, verify))
        return {"time/sync_gather": 0.5, "time/sync_transfer": 1.0, "time/sync_load": 0.25}


def test_a_publication_follows_a_step_and_its_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy()
    monkeypatch.setattr(sync.time, "perf_counter", lambda: policy.now)
    ours = sync.Ours(SimpleNamespace(policy=policy), PROBE)  # type: ignore[arg-type]
    assert [ours(), ours()] == [4.0, 4.0]
    is_target = [False] + [True] * (sync.STEP_TOKENS - 1)
    assert policy.log == [is_target, (1, True), is_target, (2, True)]
    assert ours.parts == {
        "gather": [0.5, 0.5],
        "transfer": [1.0, 1.0],
        "load": [0.25, 0.25],
        "verify": [2.25, 2.25],
    }


def test_without_verification_the_same_runs_are_compared_and_no_goal_is_claimed() -> None:
    whole = Result("sync", "", "s", [4.0, 6.0], [2.0, 2.0], [2.0, 3.0], Goal("<=", 1.5), [1.0])
    found = sync.unverified(whole, [1.0, 2.0])
    assert found.ours == [3.0, 4.0] and found.figures == [1.5, 2.0] and found.controls == [1.0]
    assert found.verdict == "" and whole.verdict == "missed"
