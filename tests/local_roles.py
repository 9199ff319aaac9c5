"""The roles of `rlhf_ray.roles`, played in this process by the real workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from threading import Event
from typing import TypeVar

import numpy as np
import torch
import torch.multiprocessing

from rlhf_ray.config.schema import (
    LoggingSection,
    ModelSection,
    OnlineSection,
    Reward,
    SimulatedAnnotator,
    TrainingSection,
)
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.engines.generation import TokenGenerator
from rlhf_ray.environments.generator import EnvironmentGenerator
from rlhf_ray.loops.checkpoints import Checkpoints
from rlhf_ray.loops.online import OnlineRoles
from rlhf_ray.loops.stage_run import StageRun
from rlhf_ray.reporting.evaluation import EvalRecord
from rlhf_ray.reporting.metrics_log import MetricsLog, MetricsRow, read_metrics
from rlhf_ray.reporting.progress import Progress, QuietProgress
from rlhf_ray.reporting.run_folder import RunFolder
from rlhf_ray.roles import Done, Pending, Reference, Referenced, ScoredChunk
from rlhf_ray.types import (
    JudgedPair,
    LabelledAnswers,
    Metrics,
    PairBatch,
    Prompts,
    Ragged,
    ReferencedPairs,
    RLBatch,
    Rollouts,
    SamplingSpec,
    Scores,
    SFTBatch,
    StepInfo,
)
from rlhf_ray.weights.source import ModuleWeightSource
from rlhf_ray.weights.verify import Probe, compare_probe
from rlhf_ray.workers.annotator import AnnotatorWorker
from rlhf_ray.workers.experience import ExperienceWorker
from rlhf_ray.workers.frozen import ReferenceWorker
from rlhf_ray.workers.model_worker import ModelWorker
from rlhf_ray.workers.policy import PolicyWorker
from rlhf_ray.workers.preference import PreferenceWorker
from rlhf_ray.workers.rewards import RewardWorker
from rlhf_ray.workers.scalar import CriticWorker, RewardTrainerWorker
from tests.fakes import HandFedGenerator
from tests.ranks import EXACT, worker_spec
from tests.tiny import tiny_tokenizer

T = TypeVar("T")
CPU = torch.device("cpu")
SPEEDS = ("perf/tokens_per_second",)


def online_section(**options: object) -> OnlineSection:
    """A small one; `options` replace its entries."""
    return OnlineSection.model_validate(
        {
            "dataset": {"path": "prompts.jsonl"},
            "rewards": [{"type": "function", "name": "vowels", "function": "tests.fakes:num_vowels"}],
            "num_steps": 4,
            "prompts_per_step": 2,
            "num_generations": 2,
            "max_completion_length": 8,
            "optimizer": {"learning_rate": 1e-3},
            "critic_init": "policy",
            "critic_optimizer": {"learning_rate": 1e-3},
            **options,
        }
    )


def weights_of(worker: ModelWorker) -> dict[str, np.ndarray]:
    """Name -> whole parameter (on rank 0; all ranks have to call)."""
    return {name: tensor.numpy().copy() for name, tensor in worker.engine.full_state_dict().items()}


def stage_run(
    folder: Path, progress: Progress | None = None, every: int | None = None, interrupt: Event | None = None
) -> StageRun:
    """A stage in `folder`, with a checkpoint every so many steps."""
    run_folder = RunFolder(folder)
    return StageRun(
        name="stage",
        folder=run_folder,
        seed=11,
        checkpoints=Checkpoints(folder / "checkpoints", every, keep_last=1),
        progress=progress or QuietProgress(),
        open_log=lambda start: MetricsLog(
            run_folder, "stage", LoggingSection(), config={}, resume_step=start
        ),
        interrupt=interrupt or Event(),
    )


def logged(folder: Path) -> list[MetricsRow]:
    """The rows of the metrics log without what depends on the clock."""
    return [
        {name: value for name, value in row.items() if not name.startswith("time") and name not in SPEEDS}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


@dataclass
class LocalGenerator:
    """Engines; prompts are dealt out in equal consecutive shares, or one by one."""

    engines: Sequence[HandFedGenerator | EnvironmentGenerator]
    streams: bool = False

    def generate(self, prompts: Prompts, sampling: SamplingSpec, seed: int) -> Sequence[Pending[Rollouts]]:
        num_shares = len(prompts) if self.streams else len(self.engines)
        shares = [rows for rows in np.array_split(np.arange(len(prompts)), num_shares) if len(rows)]
        return [
            Done(engine.generate(prompts.select(rows), sampling, seed))
            for engine, rows in zip(cycle(self.engines), shares, strict=False)
        ]


@dataclass
class LocalFeedbackEngine:
    engines: list[HandFedGenerator]

    def token_logprobs(self, sequences: Ragged) -> Sequence[Pending[Ragged]]:
        shares = [rows for rows in np.array_split(np.arange(len(sequences)), len(self.engines)) if len(rows)]
        return [
            Done(engine.token_logprobs(sequences.select(rows)))
            for engine, rows in zip(self.engines, shares, strict=False)
        ]


@dataclass
class LocalScorer:
    worker: RewardWorker

    def score(self, rollouts: Pending[Rollouts]) -> Pending[Scores]:
        return Done(self.worker.score(rollouts.result()))


@dataclass
class LocalReference:
    worker: ReferenceWorker

    def logprobs(self, rollouts: Pending[Rollouts], temperature: float) -> Pending[Ragged]:
        return Done(self.worker.logprobs(rollouts.result(), temperature))

    def answer(self, batch: Pending[Referenced]) -> Pending[Referenced]:
        return Done(self.worker.answer(batch.result()))


@dataclass
class LocalAdapterReference:
    worker: PolicyWorker

    def logprobs(self, rollouts: Pending[Rollouts], temperature: float) -> Pending[Ragged]:
        return Done(self.worker.reference_logprobs(rollouts.result(), temperature))


@dataclass
class _LocalTrained:
    worker: ModelWorker

    def save_model(self, folder: Path) -> Pending[None]:
        return Done(self.worker.save_model(folder))

    def save_state(self, folder: Path) -> Pending[None]:
        return Done(self.worker.save_state(folder))

    def load_state(self, folder: Path) -> Pending[None]:
        return Done(self.worker.load_state(folder))


@dataclass
class LocalPolicy(_LocalTrained):
    """
    Fields:
        published: the versions, in order.
    """

    worker: PolicyWorker
    engines: Sequence[HandFedGenerator] = ()
    published: list[int] = field(default_factory=list)

    def logprobs(self, chunks: Sequence[Pending[Rollouts]]) -> Pending[Ragged]:
        return Done(self.worker.logprobs(*[chunk.result() for chunk in chunks]))

    def train_rl(self, batch: Pending[RLBatch], step: int, kl_coef: float) -> Pending[Metrics]:
        return Done(self.worker.train_rl(batch.result(), step, kl_coef))

    def train_sft(self, batch: Pending[SFTBatch]) -> Pending[Metrics]:
        return Done(self.worker.train_sft(batch.result()))

    def evaluate_sft(self, batch: Pending[SFTBatch]) -> Pending[Metrics]:
        return Done(self.worker.evaluate_sft(batch.result()))

    def publish(self, version: int, verify: bool) -> Metrics:
        module = self.worker.engine.module.model
        source = ModuleWeightSource(module, torch.float32, self.worker.engine.zero_stage)
        probe = Ragged.from_rows([np.arange(3, 20)], np.int32)
        # The engine here is float32; bfloat16 in the trainer shows about 0.01.
        tolerance = 0.03 if self.worker.engine.uses_bfloat16 else 1e-4
        metrics: Metrics = {}
        for engine in self.engines:
            engine.load_weights(iter(source), version)
            if verify:
                sides = Probe(engine.token_logprobs(probe), self.worker.probe(probe))
                metrics = compare_probe(sides, None, tolerance).metrics()
        self.published.append(version)
        return metrics


@dataclass
class LocalCritic(_LocalTrained):
    worker: CriticWorker

    def values(self, chunks: Sequence[Pending[Rollouts]]) -> Pending[Ragged]:
        return Done(self.worker.values(*[chunk.result() for chunk in chunks]))

    def train_rl(self, batch: Pending[RLBatch], step: int) -> Pending[Metrics]:
        return Done(self.worker.train_rl(batch.result(), step))


@dataclass
class LocalRewardTrainer(_LocalTrained):
    worker: RewardTrainerWorker

    def train_pairs(self, batch: Pending[PairBatch]) -> Pending[Metrics]:
        return Done(self.worker.train_pairs(batch.result()))

    def score_pairs(self, batch: Pending[PairBatch]) -> Pending[tuple[Ragged, Ragged]]:
        return Done(self.worker.score_pairs(batch.result()))


@dataclass
class LocalPreferenceTrainer(_LocalTrained):
    worker: PreferenceWorker

    def train_pairs(self, batch: Pending[ReferencedPairs]) -> Pending[Metrics]:
        return Done(self.worker.train_pairs(batch.result()))

    def train_answers(self, batch: Pending[LabelledAnswers]) -> Pending[Metrics]:
        return Done(self.worker.train_answers(batch.result()))

    def score_pairs(self, batch: Pending[ReferencedPairs]) -> Pending[tuple[Ragged, Ragged]]:
        return Done(self.worker.score_pairs(batch.result()))

    def score_answers(self, batch: Pending[LabelledAnswers]) -> Pending[Ragged]:
        return Done(self.worker.score_answers(batch.result()))


@dataclass
class LocalAnnotators:
    """Fields: num_calls: how many chunks were judged."""

    worker: AnnotatorWorker
    num_calls: int = 0

    def annotate(self, rollouts: Pending[Rollouts]) -> Pending[list[JudgedPair]]:
        self.num_calls += 1
        return Done(self.worker.annotate(rollouts.result()))


@dataclass
class LocalExperience:
    worker: ExperienceWorker

    def prepare(
        self,
        info: StepInfo,
        chunks: Sequence[ScoredChunk],
        old_logprobs: Pending[Ragged] | None,
        values: Pending[Ragged] | None,
        greedy: Sequence[ScoredChunk] = (),
    ) -> tuple[Pending[RLBatch], Pending[Metrics]]:
        batch, metrics = self.worker.prepare(
            info,
            len(chunks),
            old_logprobs and old_logprobs.result(),
            values and values.result(),
            *_columns([*chunks, *greedy]),
        )
        return Done(batch), Done(metrics)

    def gather(self, chunks: Sequence[Pending[Rollouts]]) -> Pending[Rollouts]:
        return Done(self.worker.gather(*[chunk.result() for chunk in chunks]))

    def num_informative(self, chunk: ScoredChunk) -> Pending[int]:
        return Done(self.worker.num_informative(chunk.rollouts.result(), chunk.scores.result()))

    def select(
        self, chunks: Sequence[ScoredChunk], num_prompts: int
    ) -> tuple[Pending[Rollouts], Pending[Scores]]:
        rollouts, scores = self.worker.select(num_prompts, *_columns(chunks))
        return Done(rollouts), Done(scores)

    def evaluate(
        self, chunks: Sequence[ScoredChunk], logprobs: Pending[Ragged] | None
    ) -> Pending[list[EvalRecord]]:
        return Done(self.worker.evaluate(logprobs and logprobs.result(), *_columns(chunks)))

    def state_dict(self) -> Pending[dict[str, float]]:
        return Done(self.worker.state_dict())

    def load_state_dict(self, state: dict[str, float]) -> Pending[None]:
        return Done(self.worker.load_state_dict(state))


def _columns(chunks: Sequence[ScoredChunk]) -> list[Rollouts | Scores | Ragged]:
    reference = [chunk.ref_logprobs.result() for chunk in chunks if chunk.ref_logprobs is not None]
    rollouts = [chunk.rollouts.result() for chunk in chunks]
    return [*rollouts, *[chunk.scores.result() for chunk in chunks], *reference]


def player_of(engine: TokenGenerator, section: OnlineSection) -> EnvironmentGenerator:
    """The engine with the section's environment, and the tiny tokenizer."""
    assert section.environment is not None
    tokenizer = tiny_tokenizer()
    formatter = ChatFormatter(tokenizer, (2,))
    return EnvironmentGenerator(engine, tokenizer, formatter, section.environment, section.max_prompt_length)


def online_roles(
    section: OnlineSection,
    model: ModelSection,
    rollouts_folder: Path,
    rewards: Sequence[tuple[Reward, ModelSection | None]],
    training: TrainingSection = EXACT,
    num_engines: int = 1,
) -> OnlineRoles:
    """All roles of the online stage, started from one model; the critic gets a new head. With adapters the
    policy is its own reference."""
    steps = section.num_steps * section.num_ppo_epochs * section.num_mini_batches
    engines = [HandFedGenerator(Path(model.path)) for _ in range(num_engines)]
    players: list[HandFedGenerator | EnvironmentGenerator] = list(engines)
    if section.environment is not None:
        players = [player_of(engine, section) for engine in engines]
    policy = PolicyWorker(model, worker_spec(training, section.optimizer, total_steps=steps), section)
    critic = None
    if section.uses_critic:
        spec = worker_spec(training, section.critic_optimizer, total_steps=steps)
        critic = LocalCritic(CriticWorker(model, spec, section))
    reference: Reference | None = None
    if section.uses_reference and training.lora:
        reference = LocalAdapterReference(policy)
    elif section.uses_reference:
        reference = LocalReference(ReferenceWorker(model, training, CPU, threads=1))
    return OnlineRoles(
        generator=LocalGenerator(players),
        scorer=LocalScorer(reward_worker(model, rewards, training, section.environment is not None)),
        reference=reference,
        policy=LocalPolicy(policy, engines),
        critic=critic,
        experience=LocalExperience(ExperienceWorker(section, model, rollouts_folder)),
    )


def reward_worker(
    policy: ModelSection,
    rewards: Sequence[tuple[Reward, ModelSection | None]],
    training: TrainingSection = EXACT,
    has_environment: bool = False,
) -> RewardWorker:
    """Args: rewards: each source, with the model of those that are one."""
    sources = [(section, () if model is None else (model,)) for section, model in rewards]
    return RewardWorker(policy, sources, training, CPU, 1, tokens={}, has_environment=has_environment)


def annotators(
    model: ModelSection, sections: Sequence[SimulatedAnnotator], pairs_per_prompt: int, seed: int = 0
) -> LocalAnnotators:
    return LocalAnnotators(AnnotatorWorker(sections, model, pairs_per_prompt, seed))
