"""Training a reward model on preference pairs: one trained group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from actors.roles import RemoteRewardTrainer
from launch.stages.context import StageContext
from launch.stages.pairs import pairs_dataset, split
from rlhf_ray.config.schema import RewardSection
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.encoding import encode_pairs
from rlhf_ray.data.formats import PreferenceExample, preference_examples
from rlhf_ray.data.skipped import Skipped
from rlhf_ray.loops.supervised import SupervisedLoop, evaluate_pairs, pair_tokens, total_steps
from rlhf_ray.types import Metrics, PairBatch


def run_reward(context: StageContext) -> Metrics:
    section = context.config.reward
    assert section is not None
    model = context.model("model", section.model)
    train, held_out = pairs_of(context, section, context.formatter(model))
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


def pairs_of(
    context: StageContext, section: RewardSection, formatter: ChatFormatter
) -> tuple[PairBatch, PairBatch]:
    """Pairs to train on, and held-out ones."""
    dataset = pairs_dataset(context, section, "reward")

    def encode(part: Sequence[PreferenceExample]) -> tuple[PairBatch, Skipped]:
        pairs, skipped = encode_pairs(part, formatter, section.max_length)
        return pairs if section.use_margin else replace(pairs, margin=np.zeros_like(pairs.margin)), skipped

    return split(context, section, context.examples(dataset, preference_examples), encode)
