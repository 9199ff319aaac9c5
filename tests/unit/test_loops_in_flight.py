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
from rlhf_ray.data.cursor import Cursor
from rlhf_ray.errors import RlhfRayError, WeightSyncError
from rlhf_ray.loops.in_flight import Begun, InFlight
from rlhf_ray.loops.online import OnlineLoop
from rlhf_ray.reporting.lineage import SampleLineage, lineage_path, read_lineage
from rlhf_ray.roles import Generator, Pending
from rlhf_ray.types import Prompts, RLBatch, Rollouts, SamplingSpec, StepInfo
from rlhf_ray.workers.experience import ExperienceWorker
from tests.fakes import PowerCut, Watcher, cut_power
from tests.local_roles import LocalExperience, LocalGenerator, logged, online_section, stage_run
from tests.tiny import tiny_model_folder
from tests.unit.test_loops_algorithms import EVEN
from tests.unit.test_loops_online import TEXTS, assert_same_run, online_loop, policy_of, train


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


# what is in flight


def batch_of(*rows: int, version: int) -> Begun[None]:
    return Begun(rows, version, None)


@given(max_lag=st.integers(0, 5), num_steps=st.integers(1, 20), size=st.integers(1, 3), apart=st.booleans())
def test_no_prompt_is_older_than_the_bound_and_most_are_as_old(
    max_lag: int, num_steps: int, size: int, apart: bool
) -> None:
    """The oldest first, with room for max_lag + 1 batches; whether prompts are begun together or apart."""
    in_flight: InFlight[None] = InFlight((max_lag + 1) * size, max_lag)
    lags = []
    drawn = 0
    for version in range(num_steps):
        while in_flight.room and drawn < num_steps * size:
            rows = range(drawn, drawn := drawn + size)
            pieces = [(row,) for row in rows] if apart else [tuple(rows)]
            in_flight.add([batch_of(*piece, version=version) for piece in pieces])
        taken = in_flight.take(version, size)
        rows_taken = [row for begun in taken for row in begun.rows]
        assert rows_taken == list(range(version * size, (version + 1) * size)), "in the order of the draw"
        lags += [version - begun.version for begun in taken[:1]]
        assert in_flight.give_up(version + 1) == []
    assert lags == [min(version, max_lag) for version in range(num_steps)]
    assert in_flight.rows == []


@given(st.data())
def test_what_is_taken_first_is_within_the_bound_if_the_late_are_given_up(data: st.DataObject) -> None:
    max_lag, size, spare = (data.draw(st.integers(least, 3)) for least in (0, 1, 0))
    in_flight: InFlight[int] = InFlight((max_lag + 1) * size + spare, max_lag)
    fates: dict[int, list[str]] = {}
    for version in range(8):
        for row in range(len(fates), len(fates) + in_flight.room):
            in_flight.add([Begun((row,), version, row)])
            fates[row] = []

        def choose(work: Sequence[int], count: int) -> list[int]:
            return data.draw(st.permutations(range(len(work))))[:count]

        taken = in_flight.take(version, size, choose)
        assert len(taken) == size
        assert all(version - begun.version <= max_lag for begun in taken)
        assert [begun.work for begun in taken] == sorted(begun.work for begun in taken), "oldest first"
        for fate, those in (("taken", taken), ("late", in_flight.give_up(version + 1))):
            for begun in those:
                fates[begun.work].append(fate)
    for own, fate in fates.items():
        assert len(fate) == (0 if own in in_flight.rows else 1), "trained on once, or given up once"


def test_rows_in_flight_are_those_that_were_not_taken() -> None:
    in_flight: InFlight[None] = InFlight(6, 2)
    in_flight.add([batch_of(3, 1, version=0), batch_of(4, 2, version=0), batch_of(1, 5, version=0)])
    assert in_flight.room == 0
    in_flight.take(0, 2)
    assert in_flight.rows == [4, 2, 1, 5]


@pytest.mark.parametrize("version", [2, 5])
def test_a_batch_that_is_too_old_or_of_the_future_is_not_trained_on(version: int) -> None:
    in_flight: InFlight[None] = InFlight(2, 1)
    in_flight.add([batch_of(0, version=3)])
    with pytest.raises(RlhfRayError, match=rf"version 3 would train version {version}; online.max_lag=1$"):
        in_flight.take(version, 1)


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
    streams: bool = False

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
    section = online_section(
        algorithm="grpo", kl_placement="reward", num_steps=3, max_lag=1, optimizer={"learning_rate": 3e-2}
    )
    assert section.old_logprobs == "forward"
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


@dataclass
class Slow:
    """Answers prompt by prompt, those to some prompts after all others.

    Fields:
        slow: ids of these prompts. given_up: chunks that nobody wanted any more.
    """

    generator: LocalGenerator
    slow: set[int]
    given_up: list[Pending[Rollouts]] = field(default_factory=list)
    streams: bool = True

    def generate(self, prompts: Prompts, sampling: SamplingSpec, seed: int) -> Sequence[Pending[Rollouts]]:
        return self.generator.generate(prompts, sampling, seed)

    def first_done(self, chunks: Sequence[Pending[Rollouts]], count: int) -> Sequence[int]:
        is_slow = [int(chunk.result().prompt_ids[0]) in self.slow for chunk in chunks]
        return sorted(range(len(chunks)), key=lambda index: (is_slow[index], index))[:count]

    def give_up(self, chunks: Sequence[Pending[Rollouts]]) -> None:
        self.given_up += chunks


def slow_loop(
    model: ModelSection, folder: Path, slow: set[int], **options: object
) -> tuple[OnlineLoop, Slow]:
    loop = online_loop(model, folder, online_section(stragglers="drop", **options))
    assert isinstance(loop.roles.generator, LocalGenerator)
    generator = Slow(replace(loop.roles.generator, streams=True), slow)
    loop.roles = replace(loop.roles, generator=generator)
    return loop, generator


def test_prompts_that_are_answered_prompt_by_prompt_are_put_in_order(
    model: ModelSection, tmp_path: Path
) -> None:
    section = online_section(num_steps=3, prompts_per_step=3)
    whole = online_loop(model, tmp_path / "whole", section)
    train(whole)
    streaming = online_loop(model, tmp_path / "streaming", section)
    assert isinstance(streaming.roles.generator, LocalGenerator)
    streaming.roles = replace(streaming.roles, generator=replace(streaming.roles.generator, streams=True))
    train(streaming)
    for ours, theirs in zip(prompts_by_step(streaming), prompts_by_step(whole), strict=True):
        assert ours == sorted(theirs)
    ours_first, theirs_first = (
        {(s.prompt_id, s.sample_id): s.response_ids for s in lineage(loop, 0)} for loop in (streaming, whole)
    )
    assert ours_first == theirs_first, "a sample has its own seed"


def test_sampling_to_spare_trains_on_the_first_and_gives_up_the_last(
    model: ModelSection, tmp_path: Path
) -> None:
    """3 prompts for a step of 2; the slow one is begun in both steps, and needed in none."""
    drawn = Cursor(6, seed=11).next(5).tolist()
    loop, generator = slow_loop(model, tmp_path, {drawn[1]}, num_steps=2, oversample=1.5)
    train(loop)
    trained = [set(prompts) for prompts in prompts_by_step(loop)]
    assert trained == [{drawn[0], drawn[2]}, {drawn[3], drawn[4]}]
    log = logged(tmp_path)
    assert [row["lag/dropped"] for row in log] == [1.0] * 2
    assert [row["lag/max"] for row in log] == [0.0] * 2
    assert [chunk.result().prompt_ids[0] for chunk in generator.given_up] == [drawn[1]] * 2


def test_a_straggler_has_max_lag_steps_and_then_comes_again(model: ModelSection, tmp_path: Path) -> None:
    loop, generator = slow_loop(model, tmp_path, {2}, num_steps=7, max_lag=2)
    train(loop)
    for step, row in enumerate(logged(tmp_path)):
        versions = {sample.version_min for sample in lineage(loop, step)}
        assert max(0, step - 2) <= min(versions) <= max(versions) <= step
        assert row["lag/max"] == step - min(versions)
    assert sum(row["lag/dropped"] for row in logged(tmp_path)) == len(generator.given_up) > 0
    begun_again = [int(chunk.result().prompt_ids[0]) for chunk in generator.given_up]
    assert 2 in begun_again


def test_a_resumed_run_begins_with_what_was_in_flight_or_given_up(
    model: ModelSection, tmp_path: Path
) -> None:
    options = {"num_steps": 5, "max_lag": 1, "prompts_per_step": 2}
    loop, _ = slow_loop(model, tmp_path, {2}, **options)
    loop.run = stage_run(tmp_path, Watcher(3, cut_power), every=2)
    with pytest.raises(PowerCut):
        train(loop)
    state = json.loads((tmp_path / "checkpoints" / "step-000002" / "state.json").read_text())
    trained = [sample.prompt_id for step in (0, 1) for sample in lineage(loop, step) if not sample.sample_id]
    drawn = Cursor(6, seed=11).next(state["cursor"]["position"]).tolist()
    assert sorted([*trained, *state["cursor"]["again"]]) == sorted(drawn), "none is lost, none comes twice"
