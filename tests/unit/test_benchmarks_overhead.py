"""The arithmetic of what a step and a sample cost beside the stages."""

from __future__ import annotations

import pytest

from benchmarks.control_plane import Size, StepCost, driver_timings, recorded_prompts
from benchmarks.overhead import numbers_of, results_of

STEPS = [
    {
        "time/step": 10.0,
        "time/overhead": 0.01,
        "time/generate": 4.0,
        "time/prepare": 0.5,
        "time/sync": 5.4,
        "time/sync_load": 2.0,
    },
    {"time/step": 20.0, "time/overhead": 0.03, "time/generate": 15.0, "time/prepare": 4.4, "loss": 3.0},
]


def test_shares_of_a_step_by_role() -> None:
    rows = {result.case: result for result in results_of(STEPS)}
    assert list(rows) == ["", "with prepare", "(generate)", "(sync)", "(prepare)"]
    assert rows[""].ours == [0.01, 0.03] and rows[""].verdict == "met"
    assert rows["with prepare"].ours == pytest.approx([0.06, 0.25])
    assert rows["(generate)"].ours == [0.4, 0.75]
    assert rows["(sync)"].ours == pytest.approx([0.54, 0.0]), "a role that did nothing in a step"


def test_texts_and_counts_are_no_metrics() -> None:
    assert numbers_of({"stage": "online", "step": 3, "time/step": 2.0}) == {"time/step": 2.0}


def test_the_cost_of_a_sample_in_microseconds() -> None:
    cost = StepCost.of(
        Size(4000, 2048),
        {"time/step": 2.0, "time/overhead": 0.05, "time/driver_cpu": 0.02, "time/prepare": 0.4},
    )
    assert cost.per_sample(cost.outside) == pytest.approx(25.0)
    assert cost.per_sample(cost.driver) == pytest.approx(5.0)


def test_the_cpu_of_the_driver_is_counted_from_one_asking_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([1.0, 1.5, 4.0])
    monkeypatch.setattr("benchmarks.control_plane.time.process_time", lambda: next(clock))
    timings = driver_timings(lambda: {"time/busy": 7.0})
    assert timings() == {"time/busy": 7.0, "time/driver_cpu": 0.5}
    assert timings()["time/driver_cpu"] == 2.5


def test_every_recorded_prompt_is_another() -> None:
    prompts = recorded_prompts(5)
    assert len({conversation[0]["content"] for conversation in prompts.messages}) == len(prompts) == 5
    assert prompts.token_ids.lengths.tolist() == [64] * 5
