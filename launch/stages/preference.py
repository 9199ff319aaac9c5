"""Preference optimisation: the policy group, and a reference that answers before or during training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actors.roles import RemotePreferenceReference, RemotePreferenceTrainer
from launch.placement import Placement
from launch.stages.context import StageContext
from launch.stages.pairs import pairs_dataset, split
from launch.stages.reference import demand_reference, is_served, start_reference
from rlhf_ray.algorithms.preference_optimisation import PREFERENCE_ALGORITHMS, UnpairedAlgorithm
from rlhf_ray.config.preference_checks import soft_label_mistake, soft_rows
from rlhf_ray.config.schema import ModelSection, PreferenceSection
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.encoding import encode_pairs
from rlhf_ray.data.formats import (
    LabelledExample,
    PreferenceExample,
    has_labels,
    labelled_examples,
    preference_examples,
)
from rlhf_ray.data.loading import Table
from rlhf_ray.data.skipped import Skipped
from rlhf_ray.data.unpaired import encode_labelled, unpaired
from rlhf_ray.errors import ConfigError
from rlhf_ray.loops.reference_answers import AnsweredInEveryStep, ReferenceCache
from rlhf_ray.loops.stage_run import StageRun
from rlhf_ray.loops.supervised import (
    SupervisedLoop,
    evaluate_labelled,
    evaluate_pairs,
    labelled_tokens,
    pair_tokens,
    total_steps,
)
from rlhf_ray.roles import Done, Pending, Referenced
from rlhf_ray.types import LabelledAnswers, Metrics, ReferencedPairs

Answers = ReferencedPairs | LabelledAnswers


@dataclass(frozen=True)
class PreferenceData:
    """Answers to train on, and held-out ones: pairs wherever the dataset has pairs."""

    train: Answers
    held_out: Answers


def run_preference(context: StageContext) -> Metrics:
    section = context.config.preference
    assert section is not None
    model = context.model("model", section.model)
    data = answers_of(context, section, context.formatter(model))
    reference = None
    if PREFERENCE_ALGORITHMS[section.algorithm].needs_reference:
        reference = context.model("reference", section.reference, default=section.model)
        if section.cache_reference:
            data, reference = _answered_before(context, section, reference, data), None
    steps = total_steps(len(data.train), section.batch_size, section.num_epochs, section.max_steps)
    demands = [context.demand_trained("policy", model)]
    if reference is not None:
        demands.append(demand_reference(context, reference))
    with context.placement(demands) as placement, context.stage_run(placement) as run:
        group = placement.start("policy")
        context.build_trained(
            placement,
            group,
            "preference:PreferenceWorker",
            section.optimizer,
            steps,
            model=model,
            section=section,
        )
        frozen = None
        if reference is not None:
            frozen = _started(context, placement, reference, section)
        placement.wait_until_built()
        trainer = RemotePreferenceTrainer(group)
        _loop(section, data, steps, trainer, frozen, run)()
        trainer.save_model(context.folder.model.resolve()).result()
        return run.last_metrics


def _loop(
    section: PreferenceSection,
    data: PreferenceData,
    steps: int,
    trainer: RemotePreferenceTrainer,
    reference: RemotePreferenceReference | None,
    run: StageRun,
) -> SupervisedLoop[ReferencedPairs] | SupervisedLoop[LabelledAnswers]:
    """Args: reference: where it answers in every step."""
    learner = trainer if reference is None else AnsweredInEveryStep(trainer, reference)
    held_out = data.held_out if reference is None else reference.answer(Done(data.held_out)).result()

    def evaluate() -> Metrics:
        if isinstance(held_out, LabelledAnswers):
            return evaluate_labelled(trainer, held_out)
        return evaluate_pairs(trainer, held_out)

    def loop(
        rows: Referenced,
        train: Callable[[Pending[Referenced]], Pending[Metrics]],
        num_tokens: Callable[[Referenced], int],
    ) -> SupervisedLoop[Referenced]:
        return SupervisedLoop(
            rows=rows,
            batch_size=section.batch_size,
            total_steps=steps,
            eval_every=section.eval_every,
            model=trainer,
            train=train,
            evaluate=evaluate,
            num_tokens=num_tokens,
            run=run,
        )

    if isinstance(data.train, LabelledAnswers):
        return loop(data.train, learner.train_answers, labelled_tokens)
    return loop(data.train, learner.train_pairs, pair_tokens)


# The reference


def _started(
    context: StageContext, placement: Placement, model: ModelSection, section: PreferenceSection
) -> RemotePreferenceReference:
    group = start_reference(context, placement, model, section.max_length)
    return RemotePreferenceReference(group, is_served=is_served(context))


def _answered_before(
    context: StageContext, section: PreferenceSection, model: ModelSection, data: PreferenceData
) -> PreferenceData:
    """With the reference's log-probs of all answers, from the stage's folder or, once, from an actor that has
    ended before training begins."""
    config = context.config
    computes = f"vllm {config.engine.dtype}" if is_served(context) else config.training.precision
    identity = f"{_identity(model)}\n{computes}"
    cache = ReferenceCache(context.folder.path / "reference", identity)
    train, held_out = cache.read(data.train), cache.read(data.held_out)
    if train is None or held_out is None:
        count = len(data.train) + len(data.held_out)
        context.progress.message(f"{context.name}: the reference reads {count} rows before the first step")
        with context.placement([demand_reference(context, model)]) as placement:
            reference = _started(context, placement, model, section)
            placement.wait_until_built()
            train, held_out = (cache.fill(rows, reference) for rows in (data.train, data.held_out))
    return PreferenceData(train, held_out)


def _identity(model: ModelSection) -> str:
    """Changes when the weights in the model's folder are written again."""
    files = sorted(path for path in Path(model.path).iterdir() if path.is_file())
    return "\n".join([model.path, *(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)])


# Data


def answers_of(context: StageContext, section: PreferenceSection, formatter: ChatFormatter) -> PreferenceData:
    dataset = pairs_dataset(context, section, "preference")
    is_unpaired = isinstance(PREFERENCE_ALGORITHMS[section.algorithm], UnpairedAlgorithm)
    max_length = section.max_length

    def encode(part: Sequence[PreferenceExample]) -> tuple[ReferencedPairs, Skipped]:
        pairs, skipped = encode_pairs(part, formatter, max_length)
        zeros = np.zeros(len(pairs), dtype=np.float32)
        return ReferencedPairs(**vars(pairs), ref_chosen=zeros, ref_rejected=zeros), skipped

    def encode_single(part: Sequence[LabelledExample]) -> tuple[LabelledAnswers, Skipped]:
        return encode_labelled(part, formatter, max_length)

    examples = context.examples(dataset, _unpaired_examples if is_unpaired else _pairs)
    labelled = [example for example in examples if isinstance(example, LabelledExample)]
    if labelled:
        return PreferenceData(*split(context, section, labelled, encode_single, "answers"))
    compared = [example for example in examples if isinstance(example, PreferenceExample)]
    _check_soft_labels(section, dataset.path, compared)
    train, held_out = split(context, section, compared, encode)
    return PreferenceData(unpaired(train, max_length) if is_unpaired else train, held_out)


def _pairs(table: Table) -> tuple[list[LabelledExample | PreferenceExample], Skipped]:
    examples, skipped = preference_examples(table)
    return [*examples], skipped


def _unpaired_examples(table: Table) -> tuple[list[LabelledExample | PreferenceExample], Skipped]:
    """Single answers, or, where the dataset has none, pairs."""
    examples, skipped = labelled_examples(table) if has_labels(table) else preference_examples(table)
    return [*examples], skipped


def _check_soft_labels(section: PreferenceSection, source: str, pairs: list[PreferenceExample]) -> None:
    """The rows that a check before the run did not see."""
    if not any(pair.soft_label < 1 for pair in pairs):
        return
    if (mistake := soft_label_mistake(section.algorithm, soft_rows(source))) is not None:
        raise ConfigError(f"preference.algorithm={section.algorithm}: {mistake}, or remove the column")
