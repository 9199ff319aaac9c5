"""Training that does not wait for generation: what is in flight, its bound, what it changes in the loop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.config.schema import ModelSection
from rlhf_ray.errors import RlhfRayError, WeightSyncError
from rlhf_ray.loops.in_flight import Begun, InFlight
from rlhf_ray.loops.online import OnlineLoop
from rlhf_ray.reporting.lineage import SampleLineage, lineage_path, read_lineage
from rlhf_ray.roles import Generator, Pending
from rlhf_ray.types import Prompts, RLBatch, Rollouts, SamplingSpec, StepInfo
from rlhf_ray.workers.experience import ExperienceWorker
from tests.fakes import PowerCut, Watcher, cut_power
from tests.local_roles import LocalExperience, logged, online_section
from tests.tiny import tiny_model_folder
from tests.unit.test_loops_algorithms import EVEN
from tests.unit.test_loops_online import TEXTS, assert_same_run, online_loop, policy_of, train


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


# what is in flight


@given(max_lag=st.integers(0, 5), num_steps=st.integers(1, 20))
def test_no_batch_is_older_than_the_bound_and_most_are_as_old(max_lag: int, num_steps: int) -> None:
    in_flight: InFlight[int] = InFlight(max_lag)
    lags = []
    for version in range(num_steps):
        while not in_flight.is_full and version + len(in_flight) < num_steps:
            batch = version + len(in_flight)
            in_flight.add(Begun((batch,), version, batch))
        assert len(in_flight) == min(max_lag + 1, num_steps - version)
        begun = in_flight.take(version)
        assert begun.work == version, "in the order in which they began"
        lags.append(version - begun.version)
    assert lags == [min(version, max_lag) for version in range(num_steps)]
    assert in_flight.rows == []


def test_rows_in_flight_are_those_that_were_not_taken() -> None:
    in_flight: InFlight[None] = InFlight(2)
    for rows in ((3, 1), (4,), (1, 5)):
        in_flight.add(Begun(rows, 0, None))
    in_flight.take(0)
    assert in_flight.rows == [4, 1, 5]


@pytest.mark.parametrize("version", [2, 5])
def test_a_batch_that_is_too_old_or_of_the_future_is_not_trained_on(version: int) -> None:
    in_flight: InFlight[None] = InFlight(1)
    in_flight.add(Begun((0,), 3, None))
    with pytest.raises(RlhfRayError, match=rf"version 3 would train version {version}; online.max_lag=1$"):
        in_flight.take(version)


# the loop


def lineage(loop: OnlineLoop, step: int) -> list[SampleLineage]:
    return read_lineage(lineage_path(loop.run.folder.rollouts, step))


def prompts_by_step(loop: OnlineLoop) -> list[list[int]]:
    return [[sample.prompt_id for sample in lineage(loop, step)] for step in range(loop.section.num_steps)]


@dataclass
class Recorded:
    """A generator that writes down what it is asked: (prompts, newest version at that time)."""

    generator: Generator
    published: list[int]
    asked: list[tuple[int, int]] = field(default_factory=list)

    def generate(self, prompts: Prompts, sampling: SamplingSpec, seed: int) -> Sequence[Pending[Rollouts]]:
        self.asked.append((len(prompts), self.published[-1]))
        return self.generator.generate(prompts, sampling, seed)


@pytest.mark.parametrize(
    ("max_lag", "versions"), [(0, [0, 1, 2]), (1, [0, 0, 1]), (2, [0, 0, 0]), (7, [0, 0, 0])]
)
def test_generation_begins_ahead_and_ends_with_the_training(
    model: ModelSection, tmp_path: Path, max_lag: int, versions: list[int]
) -> None:
    loop = online_loop(model, tmp_path, online_section(num_steps=3, max_lag=max_lag))
    loop.held_out = loop.held_out.select([0])
    recorded = Recorded(loop.roles.generator, policy_of(loop).published)
    loop.roles = replace(loop.roles, generator=recorded)
    train(loop)
    training = [(2, version) for version in versions]
    assert recorded.asked == [(1, 0), *training, (1, 3)], "held-out prompts before and after"


@pytest.mark.parametrize("max_lag", [1, 2])
def test_every_token_keeps_its_version_and_the_prompts_do_not_depend_on_the_lag(
    model: ModelSection, tmp_path: Path, max_lag: int
) -> None:
    section = online_section(num_steps=5, optimizer={"learning_rate": 1e-2})
    synchronous = online_loop(model, tmp_path / "0", section)
    train(synchronous)
    ahead = online_loop(model, tmp_path / "ahead", section.model_copy(update={"max_lag": max_lag}))
    train(ahead)
    assert prompts_by_step(ahead) == prompts_by_step(synchronous)
    for step, row in enumerate(logged(tmp_path / "ahead")):
        lag = min(step, max_lag)
        versions = {(sample.version_min, sample.version_max) for sample in lineage(ahead, step)}
        assert versions == {(step - lag, step - lag)}
        assert row["lag/mean"] == row["lag/max"] == lag
        # Trainer and engine compute alike here, so what they differ by is their weights.
        assert (row["mismatch/logprob_diff_max"] > 1e-3) == (lag > 0)
    assert [row["lag/max"] for row in logged(tmp_path / "0")] == [0.0] * 5


class Keeping(ExperienceWorker):
    """Keeps what it was given and what it made of it."""

    def prepare(self, info: StepInfo, num_chunks: int, old, values, *columns):  # type: ignore[no-untyped-def]
        batch, metrics = super().prepare(info, num_chunks, old, values, *columns)
        rollouts = Rollouts.concat([column for column in columns if isinstance(column, Rollouts)])
        self.kept: list[tuple[Rollouts, RLBatch]] = [*getattr(self, "kept", []), (rollouts, batch)]
        return batch, metrics


def test_tokens_of_older_weights_count_by_their_importance(model: ModelSection, tmp_path: Path) -> None:
    """The decoupled objective: the loss's ratio begins at 1, and min(pi_old / sampler, 2) is a factor."""
    section = online_section(algorithm="grpo", num_steps=3, max_lag=1, optimizer={"learning_rate": 3e-2})
    loop = online_loop(model, tmp_path, section)
    worker = Keeping(section, model, loop.run.folder.rollouts)
    loop.roles = replace(loop.roles, experience=LocalExperience(worker))
    train(loop)
    for step, (rollouts, batch) in enumerate(worker.kept):
        ratio = np.exp(batch.old_logprobs.values - rollouts.logprobs.values)
        expected = np.where(batch.is_trained.values, np.minimum(ratio, 2.0), 1.0)
        assert batch.importance_weights.values == pytest.approx(expected, rel=1e-5)
        assert (np.abs(ratio - 1).max() > 0.1) == (step > 0)
    assert [row["policy/ratio_max"] for row in logged(tmp_path)] == pytest.approx([1.0] * 3, abs=1e-5)


def test_an_engine_that_misses_more_than_the_lag_allows_is_found(model: ModelSection, tmp_path: Path) -> None:
    section = online_section(num_steps=5, max_lag=1)
    loops: list[OnlineLoop] = []

    def forget_second_engine() -> None:
        policy_of(loops[0]).engines = policy_of(loops[0]).engines[:1]

    loops.append(online_loop(model, tmp_path, section, Watcher(1, forget_second_engine), num_engines=2))
    said = r"^step 3: .* of version 1, 2, and version 3 was published last \(online.max_lag=1\)"
    with pytest.raises(WeightSyncError, match=said):
        train(loops[0])


@pytest.mark.parametrize("max_lag", [1, 3])
def test_a_resumed_run_trains_on_the_same_prompts(model: ModelSection, tmp_path: Path, max_lag: int) -> None:
    """What was in flight is sampled anew, by weights that are newer than they were."""
    section = online_section(num_steps=6, max_lag=max_lag)
    whole = online_loop(model, tmp_path / "whole", section)
    train(whole)
    with pytest.raises(PowerCut):
        train(online_loop(model, tmp_path / "cut", section, Watcher(4, cut_power), every=3))
    state = json.loads((tmp_path / "cut" / "checkpoints" / "step-000003" / "state.json").read_text())
    assert len(state["cursor"]["again"]) == 2 * min(max_lag, 3)
    resumed = online_loop(model, tmp_path / "cut", section, every=3)
    train(resumed)
    assert prompts_by_step(resumed) == prompts_by_step(whole)
    assert {sample.version_min for sample in lineage(resumed, 3)} == {3}
    assert {sample.version_min for sample in lineage(resumed, 5)} == {max(3, 5 - max_lag)}


def test_a_run_that_saved_with_nothing_in_flight_resumes_as_if_it_had_not_stopped(
    model: ModelSection, tmp_path: Path
) -> None:
    section = online_section(num_steps=4)
    whole = online_loop(model, tmp_path / "whole", section)
    train(whole)
    with pytest.raises(PowerCut):
        train(online_loop(model, tmp_path / "cut", section, Watcher(3, cut_power), every=2))
    state = json.loads((tmp_path / "cut" / "checkpoints" / "step-000002" / "state.json").read_text())
    assert "again" not in state["cursor"]
    resumed = online_loop(model, tmp_path / "cut", section, every=2)
    train(resumed)
    assert_same_run(resumed, whole)


def test_the_same_seed_gives_the_same_run(model: ModelSection, tmp_path: Path) -> None:
    section = online_section(num_steps=4, max_lag=1)
    once, again = (online_loop(model, tmp_path / name, section) for name in ("once", "again"))
    train(once)
    train(again)
    assert_same_run(again, once)


def test_dynamic_sampling_looks_on_where_the_batch_in_flight_does_not_suffice(
    model: ModelSection, tmp_path: Path
) -> None:
    section = online_section(algorithm="dapo", num_steps=4, rewards=EVEN, overlong_buffer=0.0, max_lag=1)
    loop = online_loop(model, tmp_path, section)
    train(loop)
    log = logged(tmp_path)
    assert max(row["sampling/rounds"] for row in log) > 1
    lags = [row["lag/max"] for row in log]
    assert lags[0] == 0.0 and max(lags) == 1.0
    for step in range(4):
        assert len(lineage(loop, step)) == 4, "the batch keeps its size"


def test_the_greedy_answers_of_remax_are_ahead_too(model: ModelSection, tmp_path: Path) -> None:
    section = online_section(algorithm="remax", num_steps=3, num_generations=4, kl_coef=0.0, max_lag=1)
    loop = online_loop(model, tmp_path, section)
    train(loop)
    for step in range(3):
        found = lineage(loop, step)
        for prompt in {sample.prompt_id for sample in found}:
            baselines = [s.reward - s.advantage for s in found if s.prompt_id == prompt]
            assert baselines == pytest.approx([baselines[0]] * 4), "one baseline a prompt"


def test_reward_goes_up_with_two_versions_between(model: ModelSection, tmp_path: Path) -> None:
    section = online_section(
        algorithm="grpo",
        num_steps=18,
        prompts_per_step=len(TEXTS),
        num_generations=6,
        max_lag=2,
        kl_coef=0.0,
        optimizer={"learning_rate": 4e-3},
    )
    train(online_loop(model, tmp_path, section))
    rewards = [float(row["reward/mean"]) for row in logged(tmp_path)]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.7
