from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.dataset
import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.reporting.lineage import LineageBatch, SampleLineage, read_lineage, write_lineage
from rlhf_ray.types import Ragged, Rollouts, Scores


def batch() -> LineageBatch:
    rollouts = Rollouts(
        prompt_ids=np.array([7, 9]),
        sample_ids=np.array([0, 1]),
        prompts=Ragged.from_rows([[1, 2], [3]], np.int32),
        responses=Ragged.from_rows([[5, 6, 2], [8]], np.int32),
        logprobs=Ragged.from_rows([[-1, -1, -1], [-2]], np.float32),
        versions=Ragged.from_rows([[3, 3, 4], [4]], np.int32),
        is_sampled=Ragged.from_rows([[True, False, True], [True]], np.bool_),
        turn_rewards=Ragged.from_rows([[0, 0, 0], [0]], np.float32),
        finished=np.array([True, False]),
        failures=(None, "step: raised ValueError: 7"),
        columns=({}, {}),
        messages=((), ()),
    )
    scores = Scores(
        np.array([1.5, -0.5], np.float32),
        {"proxy": np.array([1.5, -0.5], np.float32), "gold": np.array([0.25, 0.75], np.float32)},
    )
    advantages = Ragged.from_rows([[0.0, 3.0], [-2.0]], np.float32)
    return LineageBatch(
        rollouts, scores, ("hi", "ho"), ("yes", "n\no"), np.array([0.5, 2.0], np.float32), advantages
    )


def test_every_sample_is_read_back_as_it_was(tmp_path: Path) -> None:
    path = write_lineage(tmp_path / "rollouts", 12, batch())
    assert path.name == "step-000012.parquet" and list(path.parent.iterdir()) == [path]
    first, second = read_lineage(path)
    assert first == SampleLineage(
        step=12,
        prompt_id=7,
        sample_id=0,
        prompt="hi",
        response="yes",
        response_ids=(5, 6, 2),
        is_sampled=(True, False, True),
        version_min=3,
        version_max=4,
        reward_parts={"proxy": 1.5, "gold": 0.25},
        reward=1.5,
        kl=0.5,
        advantage=1.5,
        finish_reason="stop",
        failure=None,
    )
    assert (second.response, second.response_ids, second.finish_reason) == ("n\no", (8,), "failed")
    assert second.failure == "step: raised ValueError: 7"
    assert (second.version_min, second.version_max, second.advantage) == (4, 4, -2.0)


def test_all_steps_are_one_table_for_other_tools(tmp_path: Path) -> None:
    for step in (0, 1, 1):  # a step that is redone after a resumption replaces its file
        write_lineage(tmp_path, step, batch())
    table = pyarrow.dataset.dataset(tmp_path, format="parquet").to_table(columns=["step", "reward/gold"])
    assert sorted(table["step"].to_pylist()) == [0, 0, 1, 1]
    assert table["reward/gold"].to_pylist() == [0.25, 0.75] * 2


def test_reading_what_is_no_lineage(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_text("x" * 100)
    for name in ("absent.parquet", "bad.parquet"):
        with pytest.raises(DataError, match=r"not a lineage file .*give a rollouts/step-\*\.parquet"):
            read_lineage(tmp_path / name)
