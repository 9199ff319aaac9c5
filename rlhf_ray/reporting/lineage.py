"""Where every trained sample came from and what was made of it: one Parquet file a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rlhf_ray.errors import DataError
from rlhf_ray.reporting.files import written_aside
from rlhf_ray.types import Ragged, Rollouts, Scores

REWARD_PREFIX = "reward/"


@dataclass(frozen=True)
class LineageBatch:
    """The samples of one step.

    Fields:
        rollouts, scores: B samples.
        prompt_texts, response_texts: [B] decoded.
        kl: [B] nats a sequence, against the reference.
        advantages: B rows, of the sampled tokens of the responses.
    """

    rollouts: Rollouts
    scores: Scores
    prompt_texts: Sequence[str]
    response_texts: Sequence[str]
    kl: NDArray[np.float32]
    advantages: Ragged


@dataclass(frozen=True)
class SampleLineage:
    """One sample, as read back.

    Fields:
        response: what was said; of an episode the whole, with the lines of the environment marked by `> `.
        response_ids: token ids as sampled. is_sampled: False where the environment spoke.
        version_min, version_max: of the weights that sampled them.
        reward_parts: reward source -> unweighted reward. reward: the weighted sum. kl: nats a sequence.
        advantage: mean over the sampled tokens.
        finish_reason: `stop` (an EOS token), `length` (cut off) or `failed` (the environment).
        failure: how it failed; None where it did not.
    """

    step: int
    prompt_id: int
    sample_id: int
    prompt: str
    response: str
    response_ids: tuple[int, ...]
    is_sampled: tuple[bool, ...]
    version_min: int
    version_max: int
    reward_parts: dict[str, float]
    reward: float
    kl: float
    advantage: float
    finish_reason: str
    failure: str | None


def lineage_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.parquet"


def write_lineage(folder: Path, step: int, batch: LineageBatch) -> Path:
    """Write the samples of `step`; the file is whole or absent. A step that is redone replaces its file.

    Args:
        folder: the run's `rollouts/`.
    """
    rollouts = batch.rollouts
    columns: dict[str, pa.Array] = {
        "step": pa.array(np.full(len(rollouts), step, dtype=np.int64)),
        "prompt_id": pa.array(rollouts.prompt_ids),
        "sample_id": pa.array(rollouts.sample_ids.astype(np.int64)),
        "prompt": pa.array(batch.prompt_texts, pa.string()),
        "response": pa.array(batch.response_texts, pa.string()),
        "response_ids": _lists(rollouts.responses, pa.int32()),
        "is_sampled": _lists(rollouts.is_sampled, pa.bool_()),
        "version_min": pa.array([int(row.min()) for row in rollouts.versions], pa.int32()),
        "version_max": pa.array([int(row.max()) for row in rollouts.versions], pa.int32()),
        **{
            f"{REWARD_PREFIX}{name}": pa.array(part, pa.float32())
            for name, part in batch.scores.parts.items()
        },
        "reward": pa.array(batch.scores.total, pa.float32()),
        "kl": pa.array(batch.kl, pa.float32()),
        "advantage": pa.array([float(row.mean()) for row in batch.advantages], pa.float32()),
        "finish_reason": pa.array(_finish_reasons(rollouts), pa.string()),
        "failure": pa.array(rollouts.failures, pa.string()),
    }
    path = lineage_path(folder, step)
    with written_aside(path) as aside:
        pq.write_table(pa.table(columns), aside, compression="zstd")
    return path


def _lists(column: Ragged, dtype: pa.DataType) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(column.offsets, pa.int32()), pa.array(column.values, dtype))


def _finish_reasons(rollouts: Rollouts) -> list[str]:
    return [
        "failed" if failure is not None else "stop" if finished else "length"
        for finished, failure in zip(rollouts.finished, rollouts.failures, strict=True)
    ]


def read_lineage(path: Path) -> list[SampleLineage]:
    """The samples of one step's file. (The whole folder is one table for pandas, DuckDB or Polars.)

    Raises:
        DataError: the file is missing or no lineage.
    """
    try:
        rows = pq.ParquetFile(path).read().to_pylist()
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{path}: not a lineage file ({error}); give a rollouts/step-*.parquet of a run"
        ) from error
    return [_sample(row) for row in rows]


def _sample(row: dict[str, object]) -> SampleLineage:
    parts = {
        name.removeprefix(REWARD_PREFIX): row.pop(name)
        for name in list(row)
        if name.startswith(REWARD_PREFIX)
    }
    ids, is_sampled = row.pop("response_ids"), row.pop("is_sampled")
    assert isinstance(ids, list) and isinstance(is_sampled, list)
    return SampleLineage(
        **row,  # type: ignore[arg-type]
        response_ids=tuple(ids),
        is_sampled=tuple(is_sampled),
        reward_parts=parts,  # type: ignore[arg-type]
    )
