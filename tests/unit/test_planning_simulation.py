"""Engines that decode, and the simulated loop."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest

from rlhf_ray.config.schema import OnlineSection
from rlhf_ray.data.cursor import Cursor
from rlhf_ray.loops.sampling import OnlineRoles, Sampler
from rlhf_ray.planning.decoding import Decoding, Speed, decode_seconds
from rlhf_ray.planning.lengths import Lengths
from rlhf_ray.planning.published import AHEAD, FITTED_AHEAD, LLAMA_8B_04, Verdict, compare_ahead
from rlhf_ray.planning.simulation import Engines, Fleet, Group, Schedule, simulate
from rlhf_ray.planning.timing import Efficiency
from rlhf_ray.types import Prompts, Ragged, SamplingSpec

UNIT = Speed(fixed=1.0, weights=0.0, read=0.0, compute=0.0)
SHARED = Speed(fixed=0.0, weights=0.0, read=1.0, compute=0.0)
"""A step takes a second for each sequence in it."""


def test_sequences_share_steps() -> None:
    engine = Decoding(UNIT, slots=2)
    engine.add([(0, 2.0), (1, 4.0), (2, 3.0)], now=0.0)
    # The third has to wait for the first, and begins at 2.
    assert [engine.pop() for _ in range(3)] == [(2.0, 0), (4.0, 1), (5.0, 2)]
    assert (engine.busy, engine.tokens) == (5.0, 9.0)


def test_a_crowd_is_slower() -> None:
    engine = Decoding(SHARED, slots=8)
    engine.add([(0, 2.0), (1, 4.0)], now=0.0)
    assert engine.pop() == (4.0, 0)
    # Two tokens are left, alone, a second each; a pause of 3 comes between.
    engine.pause(5.0, seconds=3.0)
    assert engine.pop() == (9.0, 1)
    assert decode_seconds([2.0, 4.0], 8, SHARED) == 6.0


def test_given_up_sequences_leave_room() -> None:
    engine = Decoding(SHARED, slots=8)
    engine.add([(0, 4.0), (1, 4.0)], now=0.0)
    engine.remove({0}, now=4.0)
    assert engine.pop() == (6.0, 1) and len(engine) == 0


@pytest.mark.parametrize(("mean", "longest"), [(100, 10_000), (1000, 4096), (3000, 4096)])
def test_lengths_have_their_mean_and_end(mean: float, longest: int) -> None:
    lengths = Lengths(mean, longest)
    drawn = lengths.draw(np.random.default_rng(0), 200_000)
    assert drawn.mean() == pytest.approx(mean, rel=0.02) and drawn.max() <= longest
    assert lengths.typical(2000).mean() == pytest.approx(mean, rel=0.02)


def fleet(**changed: object) -> Fleet:
    alike = Lengths(10.0, 10)  # all at the end: no tail
    whole = Fleet(4, 1, 8, UNIT, lambda devices: 24.0 / devices, 0.5, prompts=8, group=2, lengths=alike)
    return replace(whole, **changed)  # type: ignore[arg-type]


def test_without_a_tail_the_step_is_the_sum_or_the_larger() -> None:
    synchronous = simulate(fleet(), Schedule("s"), steps=3)
    assert synchronous.step == pytest.approx(10 + 24 / 4 + 0.5)
    assert (synchronous.lag_max, synchronous.given_up) == (0, 0)
    assert synchronous.busy == pytest.approx(16 / 16.5)
    # Two devices generate in 10, two train in 12.
    ahead = simulate(fleet(), Schedule("a", max_lag=1, generating=2), steps=3)
    assert ahead.step == pytest.approx(12.5)
    assert (ahead.lag_mean, ahead.lag_max) == (1.0, 1)


def test_streaming_is_bounded_and_prefers_the_short() -> None:
    tailed = fleet(lengths=Lengths(10.0, 200), train=lambda devices: 1.0)
    found = simulate(tailed, Schedule("d", max_lag=2, stragglers="drop", generating=2), steps=20)
    waiting = simulate(tailed, Schedule("w", max_lag=2, generating=2), steps=20)
    assert found.lag_max <= 2 and found.given_up > 0
    assert found.length < waiting.length
    assert found.step < waiting.step


@dataclass
class FakeGenerator:
    """The simulated engines, as the real sampler asks for them."""

    engines: Engines
    lengths: Lengths
    group: int
    random: np.random.Generator
    now: float = 0.0
    streams: bool = True
    begun: list[Group] = field(default_factory=list)

    def generate(self, prompts: Prompts, sampling: SamplingSpec, seed: int) -> list[Group]:
        for _ in range(len(prompts)):
            engine = self.engines.least_loaded()
            drawn = self.lengths.draw(self.random, self.group).tolist()
            self.begun.append(self.engines.begin(drawn, engine, self.now))
        return self.begun[len(self.begun) - len(prompts) :]

    def first_done(self, groups: list[Group], count: int) -> list[int]:
        chosen = self.engines.first_done(groups, count)
        self.now = max([self.now, *(groups[index].done for index in chosen)])
        return chosen

    def give_up(self, groups: list[Group]) -> None:
        self.engines.give_up(groups, self.now)

    # What else the sampler asks of other roles.

    def gather(self, groups: list[Group]) -> float:
        self.now = self.engines.wait(groups, self.now)
        return self.now

    def score(self, rollouts: object) -> object:
        return None


@pytest.mark.parametrize(("max_lag", "stragglers"), [(1, "wait"), (2, "wait"), (1, "drop"), (3, "drop")])
def test_the_real_sampler_over_these_engines_keeps_the_same_time(max_lag: int, stragglers: str) -> None:
    """What is simulated is the schedule that runs."""
    prompts, steps, seconds, pause = 6, 12, 3.0, 0.25
    lengths = Lengths(10.0, 100)
    section = OnlineSection.model_validate(
        {
            "algorithm": "grpo",
            "dataset": {"path": "p"},
            "rewards": [{"type": "length", "max_tokens": 1}],
            "num_steps": 10_000,
            "prompts_per_step": prompts,
            "num_generations": 2,
            "max_lag": max_lag,
            "stragglers": stragglers,
        }
    )
    fake = FakeGenerator(Engines(2, SHARED, 4), lengths, 2, np.random.default_rng(0))
    roles = OnlineRoles(*cast(list[Any], [fake, fake, None, None, None, fake]))
    rows = 500
    table = Prompts(
        np.arange(rows), (({"role": "user", "content": "?"},),) * rows,
        Ragged.from_rows([[1]] * rows, np.int32), ({},) * rows,
    )  # fmt: skip
    sampler = Sampler(section, roles, table, Cursor(rows, 0), seed=0)
    ends = []
    for step in range(steps):
        fake.engines.go_on(fake.now)
        sampler.keep_in_flight(step)
        sampler.take(step)
        fake.now += seconds
        fake.engines.pause(fake.now, pause)
        fake.now += pause
        ends.append(fake.now)
    own = Fleet(3, 1, 4, SHARED, lambda devices: seconds, pause, prompts, 2, lengths)
    schedule = Schedule("s", max_lag, "drop" if stragglers == "drop" else "wait", generating=2)
    settle = max_lag + 2
    # Training takes as long as it does, however long the answers are.
    found = simulate(own, schedule, steps - settle, seed=0, scale_training=False)
    assert found.step == pytest.approx((ends[-1] - ends[settle - 1]) / (steps - settle))


def test_a_published_row_is_predicted_from_the_other() -> None:
    ahead = next(row for row in AHEAD if row.sync is LLAMA_8B_04)
    found = compare_ahead(ahead, Efficiency())
    assert found.published == 74.6
    assert abs(found.error) < 0.15
    assert found.outcome.lag_max == 1


def test_the_verdict_claims_nothing_that_does_not_hold() -> None:
    said = str(Verdict((("a", 0.1), ("b", -0.3)), unjudged=3))
    assert said.startswith("NOT VALIDATED: the simulation reproduces 1 of 2 published step times within 15%")
    assert "off by up to 30%" in said and "3 more rows do not say what they depend on" in said
    good = Verdict((("a", 0.1),))
    assert good.is_valid and str(good).startswith("one step ahead, the simulation reproduces 1 of 1")
    assert "streaming is NOT VALIDATED" in str(good)


def test_a_row_is_fitted_or_judged_or_says_why_it_is_neither() -> None:
    uses = [compare_ahead(row, Efficiency(), steps=1).use for row in (AHEAD[0], AHEAD[1])]
    assert uses == ["fitted", "held out"]
    assert not any(row.unknown for row in FITTED_AHEAD)
    assert all(row.unknown or row.answer for row in AHEAD), "judged without knowing the lengths"
    assert all(row.unknown for row in AHEAD if row.schedule.stragglers == "drop")


def test_matrices_and_attention_take_turns() -> None:
    """Multiplying hides reading the weights, and nothing hides reading the KV cache."""
    speed = Speed(fixed=1.0, weights=10.0, read=0.5, compute=2.0, prefill=0.25)
    assert speed.step(4) == 1 + 10 + 4 * 0.75
    assert speed.step(8) == 1 + 16 + 8 * 0.75


def test_a_queue_is_filled_when_weights_change() -> None:
    """Of 24 in flight 16 are trained on, in two halves, between two changes: that bounds their age."""
    queue = Schedule("q", max_lag=4, stragglers="drop", generating=2, updates_a_sync=2, capacity=24)
    found = simulate(fleet(prompts=8), queue, steps=8)
    assert found.lag_max == 1 and found.given_up == 0
