"""Collecting preferences: engines that answer, annotators that choose; or people's choices from a file."""

from __future__ import annotations

from actors.group import ActorGroup
from actors.roles import RemoteAnnotators, RemoteGenerator
from launch.placement import Placement
from launch.stages.context import StageContext
from launch.stages.feedback import ENGINE, feedback_models, shared_length
from launch.stages.generation import build_engines, demand_engine, load_prompts
from rlhf_ray.config.schema import FileAnnotator, ModelSection, PreferencesSection, SimulatedAnnotator
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
from rlhf_ray.workers.feedback import feedback_metrics


def run_preferences(context: StageContext) -> Metrics:
    section = context.config.preferences
    assert section is not None
    people: list[JudgedPair] = []
    for annotator in section.annotators:
        if isinstance(annotator, FileAnnotator):
            examples = context.examples(annotator.dataset, preference_examples)
            people += judged_by_people(annotator.name, examples)
    asked = any(not isinstance(annotator, FileAnnotator) for annotator in section.annotators)
    generated = _generate(context, section) if asked else []
    judged = [*people, *generated]
    num_pairs = write_dataset(context.folder.path / DATASET_FILE, judged)
    counts = {"preferences/pairs_with_winner": float(num_pairs)}
    return agreement(judged) | feedback_metrics(generated) | counts


def _generate(context: StageContext, section: PreferencesSection) -> list[JudgedPair]:
    if section.dataset is None:
        raise ConfigError("preferences.dataset: missing; name the prompts that are to be answered")
    model = context.model("model", section.model)
    longest = max_model_length(model) - section.max_completion_length
    prompts = load_prompts(context, section.dataset, context.formatter(model), longest)
    judges = feedback_models(context, section, model, prompts)
    answer_len = int(prompts.token_ids.lengths.max()) + section.max_completion_length
    max_model_len = max(answer_len, shared_length(judges))
    demands = [demand_engine(context, model)]
    demands += [judge.demand(context) for judge in judges if judge.role != ENGINE]
    with context.placement(demands) as placement, context.stage_run(placement) as run:
        engines = placement.start(ENGINE)
        build_engines(context, placement, engines, model, max_model_len, version=0)
        judging = [judge.start(context, placement, engines) for judge in judges]
        annotators = _start_annotators(context, section, placement, model)
        placement.wait_until_built()
        loop = PreferencesLoop(
            section=section,
            generator=RemoteGenerator(engines),
            annotators=RemoteAnnotators(annotators),
            prompts=prompts,
            run=run,
            feedback=[
                judge.annotator(
                    engine, max_model_len if judge.role == ENGINE else judge.max_model_len, run.seed
                )
                for judge, engine in zip(judges, judging, strict=True)
            ],
        )
        return loop()


def _start_annotators(
    context: StageContext, section: PreferencesSection, placement: Placement, policy: ModelSection
) -> ActorGroup:
    """Begin to build what pairs up the answers, and votes as the simulated annotators."""
    group = placement.start_helper("annotators")
    arguments = {
        "annotators": tuple(a for a in section.annotators if isinstance(a, SimulatedAnnotator)),
        "policy": policy,
        "pairs_per_prompt": section.pairs_per_prompt,
        "seed": context.seed,
    }
    group.build(
        "rlhf_ray.workers.annotator:AnnotatorWorker",
        [arguments],
        context.config.cluster.start_timeout,
        is_pure=True,
    )
    return group
