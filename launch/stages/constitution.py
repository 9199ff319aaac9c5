"""Constitutional AI, the supervised half: engines that answer, criticise and revise; then the policy group
that learns from the revisions."""

from __future__ import annotations

import numpy as np

from actors.roles import RemoteGenerator
from launch.stages.context import StageContext
from launch.stages.generation import build_engines, demand_engine, load_prompts
from launch.stages.sft import fine_tune, sft_rows
from rlhf_ray.config.schema import ConstitutionSection, ModelSection
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.constitution import Constitution, load_constitution
from rlhf_ray.data.encoding import encode_sft
from rlhf_ray.data.formats import SFTExample
from rlhf_ray.errors import DataError
from rlhf_ray.loops.constitution import RevisionLoop, longest_conversation, read_all, revision_parts
from rlhf_ray.loops.stage_run import num_logged
from rlhf_ray.models.loading import max_model_length
from rlhf_ray.reporting.files import dump_line, write_text
from rlhf_ray.reporting.revisions import (
    REVISIONS_FILE,
    Revision,
    revision_metrics,
    revisions_markdown,
    revisions_note,
    write_revisions,
)
from rlhf_ray.types import Metrics, Prompts, SFTBatch

DATASET_FILE = "revisions.jsonl"
"""The revisions that are trained on, in the format that `sft` reads."""


def run_constitution(context: StageContext) -> Metrics:
    section = context.config.constitution
    assert section is not None
    model = context.model("model", section.model)
    formatter = context.formatter(model)
    constitution = load_constitution(section.principles)
    context.data[constitution.source] = constitution.fingerprint
    longest = max_model_length(model) - section.max_completion_length
    prompts = load_prompts(context, section.dataset, formatter, longest)
    parts = revision_parts(section, context.folder, prompts, constitution)
    parts.check_same_origin()
    if min(len(parts.done()), num_logged(context.folder)) < len(parts):
        _revise(context, model, formatter, constitution, prompts)
    revisions = read_all(parts)
    examples = _save(context, revisions)
    rows = _rows(context, section, formatter, examples)
    metrics = fine_tune(context, section, model, rows, first_step=len(parts))
    return {**metrics, **revision_metrics(revisions)}


def _revise(
    context: StageContext,
    model: ModelSection,
    formatter: ChatFormatter,
    constitution: Constitution,
    prompts: Prompts,
) -> None:
    section = context.config.constitution
    assert section is not None
    wanted = longest_conversation(section, constitution, formatter, prompts)
    max_model_len = min(wanted, max_model_length(model))
    with (
        context.placement([demand_engine(context, model)]) as placement,
        context.stage_run(placement) as run,
    ):
        engines = placement.start("engine")
        build_engines(context, placement, engines, model, max_model_len, version=0)
        placement.wait_until_built()
        generator = RemoteGenerator(engines)
        RevisionLoop(section, constitution, generator, formatter, prompts, max_model_len, run)()


def _save(context: StageContext, revisions: list[Revision]) -> list[SFTExample]:
    """Keep all that was said, and return what can be learned from it."""
    folder = context.folder
    write_revisions(folder.path / REVISIONS_FILE, revisions)
    folder.report_path.write_text(revisions_markdown(revisions), encoding="utf-8")
    context.progress.message(revisions_note(revisions))
    examples = [
        SFTExample(number, (*revision.prompt, {"role": "assistant", "content": revision.final}))
        for number, revision in enumerate(revisions)
        if revision.outcome == "used"
    ]
    if not examples:
        raise DataError(
            f"constitution: nothing to learn from: {revisions_note(revisions)} Raise max_completion_length "
            "where they were cut, or use a model that follows instructions"
        )
    rows = [dump_line({"messages": list(example.messages)}) for example in examples]
    write_text(folder.path / DATASET_FILE, "".join(rows))
    return examples


def _rows(
    context: StageContext,
    section: ConstitutionSection,
    formatter: ChatFormatter,
    examples: list[SFTExample],
) -> SFTBatch:
    """The revisions, and helpful examples beside them."""
    rows, skipped = encode_sft(examples, formatter, section.max_length)
    context.report_skipped("revisions", skipped)
    if section.helpful_dataset is None:
        return rows
    helpful = sft_rows(context, section.helpful_dataset, formatter, section.max_length)
    if section.helpful_fraction is not None:
        share = section.helpful_fraction / (1 - section.helpful_fraction)
        order = np.random.default_rng(context.seed).permutation(len(helpful))
        helpful = helpful.select(order[: max(1, round(share * len(rows)))])
    return SFTBatch.concat([rows, helpful])
