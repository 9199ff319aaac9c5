"""Reinforcement learning: all roles at once."""

from __future__ import annotations

from launch.stages.context import StageContext
from launch.stages.generation import load_prompts
from launch.stages.online_roles import OnlineBuilder, OnlineModels, demands
from launch.stages.reference import is_served
from launch.stages.rewards import find_rewards
from rlhf_ray.config.schema import OnlineSection
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.split import split_key, split_rows
from rlhf_ray.loops.online import FIRST_KL_LIMIT, OnlineLoop
from rlhf_ray.reporting.evaluation import summarise
from rlhf_ray.reporting.summary import save_closing
from rlhf_ray.types import Metrics, Prompts

HELD_OUT_PROMPTS = 64
"""Kept from the training prompts where no eval_dataset is named; a tenth of them, if that is less."""


def run_online(context: StageContext) -> Metrics:
    section = context.config.online
    assert section is not None
    policy = context.model("model", section.model)
    reference = context.model("reference", section.reference, default=section.model)
    models = OnlineModels(policy, reference, find_rewards(context, section, policy))
    formatter = context.formatter(policy)
    if section.environment is not None:
        formatter.check_continues()
    prompts, held_out = _prompts(context, section, formatter)
    with (
        context.placement(demands(context, models)) as placement,
        context.stage_run(placement) as run,
    ):
        roles = OnlineBuilder(context, placement, models).build(prompts)
        loop = OnlineLoop(
            section=section,
            sync=context.config.sync,
            roles=roles,
            prompts=prompts,
            held_out=held_out,
            run=run,
            starts_at_reference=reference == policy,
            first_kl_limit=context.config.sync.tolerance if is_served(context) else FIRST_KL_LIMIT,
        )
        before, after = loop.train()
        roles.policy.save_model(context.folder.model.resolve()).result()
    watched = [reward.name for reward in section.rewards if reward.weight == 0]
    save_closing(context.folder, summarise(before, after, watched=watched), before, after)
    return run.last_metrics


def _prompts(
    context: StageContext, section: OnlineSection, formatter: ChatFormatter
) -> tuple[Prompts, Prompts]:
    """To train on, and held out."""
    prompts = load_prompts(context, section.dataset, formatter, section.max_prompt_length)
    if section.eval_dataset is not None:
        return prompts, load_prompts(context, section.eval_dataset, formatter, section.max_prompt_length)
    keys = [split_key(messages, "prompt") for messages in prompts.messages]
    wanted = min(HELD_OUT_PROMPTS, max(1, len(prompts) // 10))
    train, held_out = split_rows(keys, float(wanted) if wanted > 1 else 1 / len(keys), context.config.seed)
    return prompts.select(train), prompts.select(held_out)
