"""What the stages share that learn from preferences: which dataset, and what is held out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from launch.stages.context import StageContext, naming
from rlhf_ray.config.schema import DatasetSection, PairsSection
from rlhf_ray.data.conversations import Turns
from rlhf_ray.data.skipped import Skipped
from rlhf_ray.data.split import split_key, split_rows
from rlhf_ray.errors import ConfigError


class _Example(Protocol):
    @property
    def messages(self) -> Turns: ...


ExampleT = TypeVar("ExampleT", bound=_Example)
RowsT = TypeVar("RowsT")


def pairs_dataset(context: StageContext, section: PairsSection, stage: str) -> DatasetSection:
    """The one that the section names, or else what the pipeline collected last."""
    dataset = section.dataset or context.artefacts.preferences
    if dataset is None:
        raise ConfigError(
            f"{stage}.dataset: missing, and no preferences stage came before; name a dataset of pairs"
        )
    return dataset


def split(
    context: StageContext,
    section: PairsSection,
    examples: Sequence[ExampleT],
    encode: Callable[[Sequence[ExampleT]], tuple[RowsT, Skipped]],
    noun: str = "pairs",
) -> tuple[RowsT, RowsT]:
    """Rows to train on and held-out rows, which share no prompt."""
    keys = [split_key(example.messages, section.split_by) for example in examples]
    train, held_out = split_rows(keys, section.held_out, context.config.seed)
    sides = []
    for name, indices in ((f"training {noun}", train), (f"held-out {noun}", held_out)):
        with naming(name):
            rows, skipped = encode([examples[i] for i in indices])
        context.report_skipped(name, skipped)
        sides.append(rows)
    return sides[0], sides[1]
