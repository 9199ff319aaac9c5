"""A small run of every kind of stage, all roles in this process, that can be interrupted and taken up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from rlhf_ray.config.schema import (
    ConstitutionSection,
    LoraSection,
    ModelSection,
    OptimizerSection,
    PreferenceSection,
    PreferencesSection,
    RewardSection,
    SimulatedAnnotator,
    SyncSection,
    TrainingSection,
)
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.constitution import load_constitution
from rlhf_ray.loops.constitution import RevisionLoop, read_all, revision_parts
from rlhf_ray.loops.online import OnlineLoop
from rlhf_ray.loops.preferences import PreferencesLoop
from rlhf_ray.loops.reference_answers import AnsweredInEveryStep
from rlhf_ray.loops.stage_run import StageRun, num_logged
from rlhf_ray.loops.supervised import SupervisedLoop, evaluate_pairs, labelled_tokens, pair_tokens, sft_tokens
from rlhf_ray.roles import Done
from rlhf_ray.types import LabelledAnswers, Metrics, Ragged, ReferencedPairs, SFTBatch
from rlhf_ray.workers.frozen import ReferenceWorker
from rlhf_ray.workers.policy import PolicyWorker
from rlhf_ray.workers.preference import PreferenceWorker
from rlhf_ray.workers.scalar import RewardTrainerWorker
from tests.fakes import HandFedGenerator
from tests.local_roles import (
    CPU,
    LocalGenerator,
    LocalPolicy,
    LocalPreferenceTrainer,
    LocalReference,
    LocalRewardTrainer,
    annotators,
    online_roles,
    online_section,
)
from tests.ranks import EXACT, worker_spec
from tests.samples import prompts_of
from tests.tiny import tiny_tokenizer

STEPS = 4
PER_STEP = 2
ROWS = 6
"""So that an epoch ends after step 3."""
TEXTS = ("boil an egg", "the capital", "a train", "soft yolk", "cold water", "the north")
HELD_OUT = ("the journey", "thank you")
SCHEDULE = OptimizerSection(learning_rate=1e-3, lr_scheduler="cosine", warmup_steps=2, weight_decay=0.1)
MIXED = TrainingSection(precision="mixed", zero_stage=2, tokens_per_micro_batch=64)
LORA = EXACT.model_copy(update={"lora": LoraSection(rank=2), "zero_stage": 1})


@dataclass(frozen=True)
class Place:
    """
    Fields:
        model: that every role starts from. num_engines: that sample.
        one_by_one: no row is computed together with another, so that none is rounded by what is beside it.
    """

    model: ModelSection
    run: StageRun
    num_engines: int = 1
    one_by_one: bool = False


Kind = Callable[[Place], object]
"""Plays what is left of a run, and returns what the loop returns."""


def rows_of(seed: int, count: int = ROWS) -> Ragged:
    generator = np.random.default_rng(seed)
    return Ragged.from_rows(
        [generator.integers(3, 290, n) for n in generator.integers(4, 20, count)], np.int32
    )


def sft(place: Place, training: TrainingSection) -> object:
    worker = PolicyWorker(place.model, worker_spec(training, SCHEDULE, total_steps=STEPS))
    policy, tokens, held_out = LocalPolicy(worker), rows_of(0), rows_of(1, 3)
    rows = SFTBatch(tokens, tokens.with_values(np.arange(len(tokens.values)) % 3 > 0))
    judged = SFTBatch(held_out, held_out.with_values(np.ones(len(held_out.values), dtype=bool)))

    def evaluate() -> Metrics:
        found = policy.evaluate_sft(Done(judged)).result()
        return {name.replace("sft/", "eval/"): value for name, value in found.items()}

    return SupervisedLoop(
        rows, PER_STEP, STEPS, 2, policy, policy.train_sft, evaluate, sft_tokens, place.run
    )()


def pairs() -> ReferencedPairs:
    zeros, ones = np.zeros(ROWS, dtype=np.float32), np.ones(ROWS, dtype=np.float32)
    prompt = np.full(ROWS, 3)
    return ReferencedPairs(prompt, rows_of(2), rows_of(3), zeros, ones, zeros, zeros)


def reward(place: Place) -> object:
    worker = RewardTrainerWorker(
        place.model, worker_spec(EXACT, SCHEDULE, total_steps=STEPS), RewardSection()
    )
    trainer, rows = LocalRewardTrainer(worker), pairs()
    return SupervisedLoop(
        rows,
        PER_STEP,
        STEPS,
        2,
        trainer,
        trainer.train_pairs,
        lambda: evaluate_pairs(trainer, rows),
        pair_tokens,
        place.run,
    )()


def preference(place: Place, algorithm: str) -> object:
    section = PreferenceSection.model_validate({"algorithm": algorithm})
    worker = PreferenceWorker(place.model, worker_spec(EXACT, SCHEDULE, total_steps=STEPS), section)
    trainer = LocalPreferenceTrainer(worker)
    answering = AnsweredInEveryStep(
        trainer, LocalReference(ReferenceWorker(place.model, EXACT, CPU, threads=1))
    )
    if algorithm != "kto":
        return SupervisedLoop(
            pairs(), PER_STEP, STEPS, 2, trainer, answering.train_pairs, dict, pair_tokens, place.run
        )()
    zeros = np.zeros(ROWS, dtype=np.float32)
    good = np.arange(ROWS) % 2 == 0
    rows = LabelledAnswers(np.full(ROWS, 3), rows_of(2), good, rows_of(3), zeros, zeros)
    return SupervisedLoop(
        rows, PER_STEP, STEPS, 2, trainer, answering.train_answers, dict, labelled_tokens, place.run
    )()


def online(place: Place, training: TrainingSection = EXACT, **options: object) -> object:
    section = online_section(num_steps=STEPS, temperature=0.9, eval_every=2, **options)
    rewards = [(each, None) for each in section.rewards]
    if place.one_by_one:
        training = training.model_copy(update={"tokens_per_micro_batch": 1})
    folder = place.run.folder.rollouts
    roles = online_roles(section, place.model, folder, rewards, training, place.num_engines)
    assert isinstance(roles.policy, LocalPolicy)
    _set_batches(place, roles.policy.engines)
    return OnlineLoop(
        section=section,
        sync=SyncSection(verify_first=2, verify_every=2),
        roles=roles,
        prompts=prompts_of(*TEXTS),
        held_out=prompts_of(*HELD_OUT),
        run=place.run,
        starts_at_reference=True,
    ).train()


def engines_of(place: Place) -> LocalGenerator:
    folder = Path(place.model.path)
    engines = [HandFedGenerator(folder, version=0) for _ in range(place.num_engines)]
    _set_batches(place, engines)
    return LocalGenerator(engines)


def _set_batches(place: Place, engines: Sequence[HandFedGenerator]) -> None:
    if place.one_by_one:
        for engine in engines:
            engine.batch_size = 1


PROMPTS = (*TEXTS, *HELD_OUT)
"""Two a step: as many steps as elsewhere."""


def preferences(place: Place) -> object:
    judge = SimulatedAnnotator(name="one", function="tests.fakes:num_vowels", temperature=1.0)
    section = PreferencesSection(
        annotators=(judge,), num_generations=3, max_completion_length=8, prompts_per_step=PER_STEP
    )
    judges = annotators(place.model, [judge], 2)
    return PreferencesLoop(section, engines_of(place), judges, prompts_of(*PROMPTS), place.run)()


PRINCIPLES = """\
principles:
  - {id: kind, critique: "What is rude?", revision: "Be kind.", choice: "Kinder?", source: s}
  - {id: honest, critique: "What is false?", revision: "Be honest.", choice: "Truer?", source: s}
"""


def constitution(place: Place) -> object:
    """The answers, and then the fine-tuning, whose steps follow."""
    path = place.run.folder.path.parent / "principles.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(PRINCIPLES)
    section = ConstitutionSection.model_validate(
        {
            "dataset": {"path": "prompts.jsonl"},
            "principles": str(path),
            "max_completion_length": 8,
            "max_critique_length": 6,
            "prompts_per_step": 4,
        }
    )
    formatter, prompts = ChatFormatter(tiny_tokenizer(), (2,)), prompts_of(*PROMPTS)
    principles, run = load_constitution(str(path)), place.run
    parts = revision_parts(section, run.folder, prompts, principles)
    if min(len(parts.done()), num_logged(run.folder)) < len(parts):
        RevisionLoop(section, principles, engines_of(place), formatter, prompts, 200, run)()
        run.close()
    tuning = replace(place, run=replace(run, first_step=len(parts), _log=None))
    try:
        return read_all(parts), sft(tuning, EXACT)
    finally:
        tuning.run.close()


EVEN = [{"type": "function", "name": "even", "function": "tests.fakes:even_length"}]
PPO = {
    "normalize_rewards": True,
    "kl_target": 0.5,
    "kl_horizon": 20,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "optimizer": {"learning_rate": 1e-3, "lr_scheduler": "linear", "warmup_steps": 1},
}
KINDS: dict[str, Kind] = {
    "sft": partial(sft, training=EXACT),
    "sft, bfloat16, ZeRO 2": partial(sft, training=MIXED),
    "constitution": constitution,
    "preferences": preferences,
    "reward": reward,
    "preference, dpo": partial(preference, algorithm="dpo"),
    "preference, kto": partial(preference, algorithm="kto"),
    "ppo": partial(online, **PPO),
    "ppo, bfloat16, ZeRO 2": partial(online, training=MIXED, **PPO),
    "ppo, LoRA": partial(online, training=LORA, **PPO),
    "grpo": partial(online, algorithm="grpo"),
    "dapo, dynamic sampling": partial(online, algorithm="dapo", rewards=EVEN, overlong_buffer=0.0),
    "remax, greedy answers": partial(online, algorithm="remax", kl_coef=0.01),
}
WITHOUT_CHECKPOINTS = ("preferences",)
"""Its files, one a step, are its state."""
WITH_ENGINES = [
    name
    for name in KINDS
    if name.split(",")[0] in ("constitution", "preferences", "ppo", "grpo", "dapo", "remax")
]


def lagging(place: Place) -> object:
    """Two versions ahead; with more steps than the others."""
    return online(place, **cast(dict[str, object], {"algorithm": "grpo", "max_lag": 2}))
