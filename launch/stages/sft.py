"""Supervised fine-tuning: the policy group alone."""

from __future__ import annotations

from actors.roles import RemotePolicy
from launch.stages.context import StageContext, naming
from rlhf_ray.config.schema import ConstitutionSection, DatasetSection, ModelSection, SFTSection
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.encoding import encode_sft
from rlhf_ray.data.formats import sft_examples
from rlhf_ray.loops.supervised import SupervisedLoop, sft_tokens, total_steps
from rlhf_ray.roles import Done
from rlhf_ray.types import Metrics, SFTBatch


def run_sft(context: StageContext) -> Metrics:
    section = context.config.sft
    assert section is not None
    model = context.model("model", section.model)
    formatter = context.formatter(model)
    rows = sft_rows(context, section.dataset, formatter, section.max_length)
    return fine_tune(context, section, model, rows)


def fine_tune(
    context: StageContext,
    section: SFTSection | ConstitutionSection,
    model: ModelSection,
    rows: SFTBatch,
    first_step: int = 0,
) -> Metrics:
    """Train the model on the rows and save it; returns the last step's metrics.

    Args:
        first_step: steps of the stage that were done before.
    """
    held_out = None
    if section.eval_dataset is not None:
        held_out = sft_rows(context, section.eval_dataset, context.formatter(model), section.max_length)
    steps = total_steps(len(rows), section.batch_size, section.num_epochs, section.max_steps)
    with (
        context.placement([context.demand_trained("policy", model)]) as placement,
        context.stage_run(placement, first_step) as run,
    ):
        group = placement.start("policy")
        context.build_trained(placement, group, "policy:PolicyWorker", section.optimizer, steps, model=model)
        placement.wait_until_built()
        policy = RemotePolicy(group, context.config.sync)

        def evaluate() -> Metrics:
            if held_out is None:
                return {}
            metrics = policy.evaluate_sft(Done(held_out)).result()
            return {name.replace("sft/", "eval/"): value for name, value in metrics.items()}

        loop = SupervisedLoop(
            rows=rows,
            batch_size=section.batch_size,
            total_steps=steps,
            eval_every=section.eval_every,
            model=policy,
            train=policy.train_sft,
            evaluate=evaluate,
            num_tokens=sft_tokens,
            run=run,
        )
        loop()
        policy.save_model(context.folder.model.resolve()).result()
        return run.last_metrics


def sft_rows(
    context: StageContext, section: DatasetSection, formatter: ChatFormatter, max_length: int
) -> SFTBatch:
    examples = context.examples(section, sft_examples)
    with naming(section.path):
        rows, skipped = encode_sft(examples, formatter, max_length)
    context.report_skipped(section.path, skipped)
    return rows
