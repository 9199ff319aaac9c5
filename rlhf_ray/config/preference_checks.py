"""Whether the algorithm of the preference stage can use the labels that its pairs have."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_ray.config.document import KeyPath
from rlhf_ray.config.parts import Parts
from rlhf_ray.config.schema import (
    ConstitutionAnnotator,
    DatasetSection,
    FileAnnotator,
    PreferenceSection,
    PreferencesSection,
)


def soft_label_mistake(algorithm: str, has_them: str) -> str | None:
    """
    Args:
        has_them: what has soft labels, such as `pairs.jsonl has rows with a soft_label below 1`.
    """
    from rlhf_ray.algorithms.preference_optimisation import PREFERENCE_ALGORITHMS

    fitting = [name for name, row in PREFERENCE_ALGORITHMS.items() if row.takes_soft_labels]
    if algorithm in fitting:
        return None
    return f"{has_them}, which only {' and '.join(fitting)} can use; use one of them"


def soft_rows(source: str) -> str:
    return f"{source} has rows with a soft_label below 1"


def preference_mistakes(parts: Parts) -> Iterator[tuple[KeyPath, str]]:
    section = parts.get(PreferenceSection, "preference")
    if section is None:
        return
    for has_them, remedy in _soft_sources(parts, section):
        if (mistake := soft_label_mistake(section.algorithm, has_them)) is not None:
            yield ("preference", "algorithm"), f"{mistake}, or {remedy}"


def _soft_sources(parts: Parts, section: PreferenceSection) -> Iterator[tuple[str, str]]:
    """What brings soft labels, as far as that is known before the run, and how to be rid of them."""
    if section.dataset is not None:
        if _is_soft(section.dataset, section.algorithm):
            yield soft_rows(section.dataset.path), "remove the column"
        return
    collected = parts.get(PreferencesSection, "preferences")
    if collected is None or "preferences" not in parts.before("preference"):
        return
    for annotator in collected.annotators:
        if isinstance(annotator, ConstitutionAnnotator):
            yield f"annotator {annotator.name} gives soft labels", "leave it out"
        elif isinstance(annotator, FileAnnotator) and _is_soft(annotator.dataset, "dpo"):
            yield f"annotator {annotator.name}: {soft_rows(annotator.dataset.path)}", "remove the column"


def _is_soft(dataset: DatasetSection, algorithm: str) -> bool:
    """Args: algorithm: that the rows are read for; kto prefers single answers, which have no soft label."""
    from rlhf_ray.data.formats import has_soft_labels

    return has_soft_labels(dataset, "labelled answers" if algorithm == "kto" else "pairs")
