"""A configuration taken apart into sections that are valid by themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from pydantic import ValidationError

from rlhf_ray.config import outline
from rlhf_ray.config.document import Document, KeyPath, Raw
from rlhf_ray.config.schema import STAGES, ModelSection, Section, StageName

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Parts:
    """A configuration taken apart.

    Fields:
        document: what was written.
        sections: key path -> section, where that section by itself is valid.
        stages: the stages in the order in which they run.
    """

    document: Document
    sections: dict[KeyPath, Section]
    stages: tuple[StageName, ...]

    @classmethod
    def of(cls, document: Document) -> Parts:
        sections = dict(_valid_sections(document.tree, outline.root(), ()))
        written = document.value(("pipeline",))
        order = written if isinstance(written, list) and written else list(STAGES)
        stages = tuple(name for name in STAGES if isinstance(document.value((name,)), dict) and name in order)
        return cls(document, sections, tuple(sorted(stages, key=order.index)))

    def get(self, kind: type[S], *path: str | int) -> S | None:
        """The section at a path, if it is there and valid."""
        found = self.sections.get(path)
        return found if isinstance(found, kind) else None

    def all(self, kind: type[S]) -> Iterator[tuple[KeyPath, S]]:
        return ((path, section) for path, section in self.sections.items() if isinstance(section, kind))

    def before(self, stage: StageName) -> tuple[StageName, ...]:
        return self.stages[: self.stages.index(stage)] if stage in self.stages else ()

    def start_of(self, stage: StageName) -> KeyPath | None:
        """Where the model that a stage starts from is named, seen through what earlier stages make of it.

        None where a model of that stage is written, and wrong.
        """
        if self.document.value((stage, "model")) is not None:
            return (stage, "model") if self.get(ModelSection, stage, "model") else None
        kinds = ("sft", "constitution", "preference", "online")
        makers = [name for name in self.before(stage) if name in kinds]
        return self.start_of(makers[-1]) if makers else ("model",)


def _valid_sections(raw: Raw, node: outline.Node, path: KeyPath) -> Iterator[tuple[KeyPath, Section]]:
    entry = outline.entries(node)
    if isinstance(raw, list) and entry is not None:
        for index, value in enumerate(raw):
            yield from _valid_sections(value, entry, (*path, index))
    here = outline.section(node, raw)
    if here is None or not isinstance(raw, dict):
        return
    with suppress(ValidationError):  # said where the whole is validated; the sections inside may be right
        yield path, outline.class_of(here).model_validate_json(json.dumps(raw), strict=True)
    for key, value in raw.items():
        yield from _valid_sections(value, outline.properties(here)[key], (*path, key))
