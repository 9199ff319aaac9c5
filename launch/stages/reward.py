"""Training a reward model on preference pairs: one trained group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from actors.roles import RemoteRewardTrainer
from launch.stages.context import StageContext, naming
from rlhf_ray.config.schema import RewardSection
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.encoding import encode_pairs
from rlhf_ray.data.formats import PreferenceExample, preference_examples
from rlhf_ray.data.split import split_key, split_rows
from rlhf_ray.errors import ConfigError
from rlhf_ray.loops.supervised import SupervisedLoop, evaluate_pairs, pair_tokens, total_steps
from rlhf_ray.types import Metrics, PairBatch


def run_reward(context: StageContext) -> Metrics:
    section = context.config.reward
    assert section is not None
    dataset = section.dataset or context.artefacts.preferences
    if dataset is None:
        raise ConfigError(
            "reward.dataset: missing, and no preferences stage came before; name a dataset of pairs"
        )
    model = context.model("model", section.model)
    examples = context.examples(dataset, preference_examples)
    train, held_out = _split(context, section, examples, context.formatter(model))
    steps = total_steps(len(train), section.batch_size, section.num_epochs, section.max_steps)
    # The model in training has the placement of the policy: `placement.reward` is for the frozen one.
    demand = context.demand_trained("policy", model)
    with context.placement([demand]) as placement, context.stage_run(placement) as run:
        group = placement.start("policy")
        context.build_trained(
            placement,
            group,
            "scalar:RewardTrainerWorker",
            section.optimizer,
            steps,
            model=model,
            section=section,
        )
        placement.wait_until_built()
        trainer = RemoteRewardTrainer(group)
        loop = SupervisedLoop(
            rows=train,
            batch_size=section.batch_size,
            total_steps=steps,
            eval_every=section.eval_every,
            model=trainer,
            train=trainer.train_pairs,
            evaluate=lambda: evaluate_pairs(trainer, held_out),
            num_tokens=pair_tokens,
            run=run,
        )
        loop()
        trainer.save_model(context.folder.model.resolve()).result()
        return run.last_metrics


def _split(
    context: StageContext, section: RewardSection, examples: list[PreferenceExample], formatter: ChatFormatter
) -> tuple[PairBatch, PairBatch]:
    """Training and held-out pairs, which share no prompt."""
    keys = [split_key(example.messages, section.split_by) for example in examples]
    sides = []
    for name, indices in zip(
        ("training pairs", "held-out pairs"),
        split_rows(keys, section.held_out, context.config.seed),
        strict=True,
    ):
        with naming(name):
            pairs, skipped = encode_pairs([examples[i] for i in indices], formatter, section.max_length)
        context.report_skipped(name, skipped)
        if not section.use_margin:
            pairs = replace(pairs, margin=np.zeros_like(pairs.margin))
        sides.append(pairs)
    return sides[0], sides[1]
