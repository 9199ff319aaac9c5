"""Collecting preferences: engines that answer, annotators that choose; or people's choices from a file."""

from __future__ import annotations

from actors.roles import RemoteAnnotators, RemoteGenerator
from launch.placement import RoleDemand
from launch.stages.context import StageContext
from launch.stages.generation import build_engines, demand_engine, load_prompts
from rlhf_ray.config.schema import FileAnnotator, PreferencesSection, SimulatedAnnotator
from rlhf_ray.data.formats import preference_examples
from rlhf_ray.errors import ConfigError
from rlhf_ray.loops.preferences import (
    DATASET_FILE,
    PreferencesLoop,
    agreement,
    judged_by_people,
    write_dataset,
)
from rlhf_ray.models.loading import max_model_length
from rlhf_ray.types import JudgedPair, Metrics


def run_preferences(context: StageContext) -> Metrics:
    section = context.config.preferences
    assert section is not None
    judged: list[JudgedPair] = []
    for annotator in section.annotators:
        if isinstance(annotator, FileAnnotator):
            examples = context.examples(annotator.dataset, preference_examples)
            judged += judged_by_people(annotator.name, examples)
    simulated = [a for a in section.annotators if isinstance(a, SimulatedAnnotator)]
    if simulated:
        judged += _generate(context, section, simulated)
    num_pairs = write_dataset(context.folder.path / DATASET_FILE, judged)
    return {**agreement(judged), "preferences/pairs_with_winner": float(num_pairs)}


def _generate(
    context: StageContext, section: PreferencesSection, simulated: list[SimulatedAnnotator]
) -> list[JudgedPair]:
    if section.dataset is None:
        raise ConfigError("preferences.dataset: missing; name the prompts that are to be answered")
    model = context.model("model", section.model)
    longest = max_model_length(model) - section.max_completion_length
    prompts = load_prompts(context, section.dataset, context.formatter(model), longest)
    max_model_len = int(prompts.token_ids.lengths.max()) + section.max_completion_length
    demands: list[RoleDemand] = [demand_engine(context, model)]
    with context.placement(demands) as placement, context.stage_run(placement) as run:
        engines = placement.start("engine")
        build_engines(context, placement, engines, model, max_model_len, version=0)
        annotators = placement.start_helper("annotators")
        arguments = {
            "annotators": tuple(simulated),
            "policy": model,
            "pairs_per_prompt": section.pairs_per_prompt,
            "seed": context.seed,
        }
        annotators.build(
            "rlhf_ray.workers.annotator:AnnotatorWorker", [arguments], context.config.cluster.start_timeout
        )
        placement.wait_until_built()
        loop = PreferencesLoop(
            section=section,
            generator=RemoteGenerator(engines),
            annotators=RemoteAnnotators(annotators),
            prompts=prompts,
            run=run,
        )
        return loop()
