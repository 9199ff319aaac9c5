"""Weights for an engine that was replaced, compared with the trainer that published them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from actors.roles import RemotePolicy
from rlhf_ray.config.schema import SyncSection
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.roles import Done
from rlhf_ray.types import Ragged

SEQUENCES = Ragged.from_rows([[1, 2, 3, 4]], np.int32)


def logprobs(version: int) -> Ragged:
    """Under the weights of a version; each moves by far less than what is tolerated."""
    return Ragged.from_rows([[-1.0 - 0.05 * version * k for k in (1, 2, 3)]], np.float32)


class OneEngine(SimpleNamespace):
    def __len__(self) -> int:
        return 1


class Run:
    """A policy and its only engine, which answers by what it has. Once the engine has its weights, what had
    waited for its answers goes on, and trains the policy."""

    def __init__(self) -> None:
        self.trainer = self.engine = 0
        self.goes_on = self.misses_update = False
        group = OneEngine(num_starts=[0], note_weights=lambda joined: None, refresh=None)
        engines = SimpleNamespace(group=group, wait=lambda: None, probe=self.probe)
        transfer = SimpleNamespace(join=lambda: None, joined=())
        trainer = SimpleNamespace(call=self.call)
        self.policy = RemotePolicy(trainer, SyncSection(), engines, SEQUENCES, transfer)

    def probe(self, _: Ragged) -> list[Done]:
        return [Done(logprobs(self.engine))]

    def call(self, method: str, *_: object, kind: str) -> Done:
        if method == "probe":
            return Done(logprobs(self.trainer))
        assert method == "publish"
        self.engine = self.engine if self.misses_update else self.trainer
        self.trainer += self.goes_on
        return Done({})

    def lose_the_engine(self) -> None:
        self.engine = 0


@pytest.fixture
def run() -> Run:
    started = Run()
    started.policy.publish(0, verify=True)
    started.trainer = 1
    started.policy.publish(1, verify=True)
    started.lose_the_engine()
    return started


def test_training_that_goes_on_meanwhile_is_no_mismatch(run: Run) -> None:
    run.goes_on = True
    run.policy._publish_again()
    assert (run.engine, run.trainer) == (1, 2)


def test_an_engine_that_misses_it_is_found_out(run: Run) -> None:
    run.misses_update, run.engine = True, 20
    with pytest.raises(WeightSyncError):
        run.policy._publish_again()
