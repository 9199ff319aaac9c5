"""Where the batches of the online loop come from: engines that answer, and frozen models that judge.

Engines are asked for more than the next batch (`keep_in_flight`), and the loop takes what it trains on
(`take`). With `max_lag: 0` only that batch is ever asked for, by the weights that it will train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from rlhf_ray.algorithms import ALGORITHMS
from rlhf_ray.config.schema import OnlineSection
from rlhf_ray.data.cursor import Cursor
from rlhf_ray.loops.in_flight import Begun, InFlight
from rlhf_ray.roles import (
    Critic,
    Experience,
    Generator,
    Pending,
    Policy,
    Reference,
    ScoredChunk,
    Scorer,
    StreamingGenerator,
)
from rlhf_ray.seeds import derive_seed
from rlhf_ray.types import Metrics, Prompts, Ragged, Rollouts, SamplingSpec


@dataclass(frozen=True)
class OnlineRoles:
    generator: Generator
    scorer: Scorer
    reference: Reference | None
    policy: Policy
    critic: Critic | None
    experience: Experience


@dataclass(frozen=True)
class Sampled:
    """The answers of a step.

    Fields:
        greedy: the most likely answers to the same prompts, for algorithms that compare with them.
    """

    chunks: list[ScoredChunk]
    greedy: list[ScoredChunk] = field(default_factory=list)
    metrics: Metrics = field(default_factory=dict)

    @property
    def rollouts(self) -> list[Pending[Rollouts]]:
        return [chunk.rollouts for chunk in self.chunks]


@dataclass(frozen=True)
class Answering:
    """What the engines are at. Fields: greedy: as in `Sampled`."""

    rollouts: Sequence[Pending[Rollouts]]
    greedy: Sequence[Pending[Rollouts]] = ()


@dataclass
class Sampler:
    """
    Fields:
        prompts: to train on; cursor: over them. seed: of the stage.
    """

    section: OnlineSection
    roles: OnlineRoles
    prompts: Prompts
    cursor: Cursor
    seed: int

    def __post_init__(self) -> None:
        section = self.section
        capacity = (section.max_lag + 1) * section.prompts_per_step + section.spare_prompts
        self.in_flight: InFlight[Answering] = InFlight(capacity, section.max_lag)

    def keep_in_flight(self, step: int) -> None:
        """The engines are always at (max_lag + 1) batches, that of `step` and the next ones, and at the spare
        prompts of one."""
        in_flight, size = self.in_flight, self.section.prompts_per_step
        wanted = (self.section.num_steps - step) * size + self.section.spare_prompts
        while (count := min(size, in_flight.room, wanted - len(in_flight))) > 0:
            rows = self.cursor.next(count).tolist()
            batch = step + len(in_flight) // size
            in_flight.add(self._begun(rows, step, self._begin(rows, batch)))

    def take(self, step: int) -> Sampled:
        """The batch of this step, judged: the oldest prompts in flight, or those that are answered first.

        What would be too old for the next step is given up then, and its prompts come again.
        """
        size = self.section.prompts_per_step
        if self.section.stragglers == "wait":
            return self._judge(_together(self.in_flight.take(step, size)), step)
        generator = cast(StreamingGenerator, self.roles.generator)  # the configuration sees to it
        taken = self.in_flight.take(
            step, size, lambda work, count: generator.first_done([each.rollouts[0] for each in work], count)
        )
        late = self.in_flight.give_up(version=step + 1)
        generator.give_up([chunk for each in late for chunk in (*each.work.rollouts, *each.work.greedy)])
        self.cursor.give_back([row for each in late for row in each.rows])
        sampled = self._judge(_together(taken), step)
        return replace(sampled, metrics={**sampled.metrics, "lag/dropped": float(len(late))})

    def _begin(self, rows: Sequence[int], batch: int) -> Answering:
        """Let the engines answer. batch: the step that will train on it, if all goes in order."""
        if self.section.recipe.dynamic_sampling:
            return Answering(self._sample_round(rows, batch, 0))
        prompts, seed = self.prompts.select(rows), derive_seed(self.seed, batch)
        rollouts = self.roles.generator.generate(prompts, self.sampling, seed)
        if not ALGORITHMS[self.section.algorithm].needs_greedy:
            return Answering(rollouts)
        greedy = self.roles.generator.generate(prompts, self.sampling_one(temperature=0.0), seed)
        return Answering(rollouts, greedy)

    def _begun(self, rows: Sequence[int], version: int, work: Answering) -> list[Begun[Answering]]:
        """In as many pieces as can be trained on apart."""
        if not self.roles.generator.streams:
            return [Begun(tuple(rows), version, work)]
        greedy: list[tuple[Pending[Rollouts], ...]] = [(chunk,) for chunk in work.greedy]
        return [
            Begun((row,), version, Answering((rollouts,), own))
            for row, rollouts, own in zip(rows, work.rollouts, greedy or [()] * len(rows), strict=True)
        ]

    def _judge(self, begun: Begun[Answering], step: int) -> Sampled:
        """The answers, with what the frozen models say of them."""
        if self.section.recipe.dynamic_sampling:
            return self._judge_informative(begun, step)
        rollouts, greedy = self.whole(begun.work.rollouts), self.whole(begun.work.greedy)
        return Sampled(self.judged(rollouts), self._scored(greedy))

    def _sample_round(self, rows: Sequence[int], step: int, num_rounds: int) -> Sequence[Pending[Rollouts]]:
        seed = derive_seed(self.seed, step, num_rounds)
        return self.roles.generator.generate(self.prompts.select(rows), self.sampling, seed)

    def _judge_informative(self, begun: Begun[Answering], step: int) -> Sampled:
        """Draw more prompts until enough of them have answers that the rewards tell apart (DAPO: Yu et al.
        2025, section 3.2). Where they do not suffice, others fill the batch up."""
        wanted, experience = self.section.prompts_per_step, self.roles.experience
        scored: list[ScoredChunk] = []
        drawn = set(begun.rows)
        rollouts = begun.work.rollouts
        num_informative = num_rounds = 0
        while rollouts:
            fresh = self._scored(self.whole(rollouts))
            scored += fresh
            num_informative += sum(experience.num_informative(chunk).result() for chunk in fresh)
            num_rounds += 1
            if num_informative >= wanted or num_rounds >= self.section.max_sampling_rounds:
                break
            rows = [row for row in self.cursor.next(wanted).tolist() if row not in drawn]
            drawn.update(rows)
            rollouts = self._sample_round(rows, step, num_rounds) if rows else ()
        chosen, scores = experience.select(scored, wanted)
        metrics = {
            "sampling/rounds": float(num_rounds),
            "sampling/informative_fraction": num_informative / len(drawn),
        }
        return Sampled([ScoredChunk(chosen, scores, self._reference_logprobs(chosen))], metrics=metrics)

    def whole(self, chunks: Sequence[Pending[Rollouts]]) -> Sequence[Pending[Rollouts]]:
        """As they come from engines that take a batch at once; what arrives prompt by prompt is put together,
        in an order that does not depend on when it arrived."""
        is_whole = not (chunks and self.roles.generator.streams)
        return chunks if is_whole else [self.roles.experience.gather(chunks)]

    def _scored(self, rollouts: Sequence[Pending[Rollouts]]) -> list[ScoredChunk]:
        """With rewards, begun as soon as a chunk is there."""
        return [ScoredChunk(chunk, self.roles.scorer.score(chunk), None) for chunk in rollouts]

    def judged(self, rollouts: Sequence[Pending[Rollouts]]) -> list[ScoredChunk]:
        """With rewards and the reference's log-probs."""
        return [
            replace(chunk, ref_logprobs=self._reference_logprobs(chunk.rollouts))
            for chunk in self._scored(rollouts)
        ]

    def _reference_logprobs(self, rollouts: Pending[Rollouts]) -> Pending[Ragged] | None:
        reference = self.roles.reference
        return reference.logprobs(rollouts, self.section.temperature) if reference else None

    @property
    def sampling(self) -> SamplingSpec:
        one = self.sampling_one(self.section.temperature)
        return replace(one, num_generations=self.section.num_generations)

    def sampling_one(self, temperature: float) -> SamplingSpec:
        """One answer a prompt; the most likely one at temperature 0."""
        return SamplingSpec(self.section.max_completion_length, temperature=temperature)


def _together(begun: Sequence[Begun[Answering]]) -> Begun[Answering]:
    return Begun(
        rows=tuple(row for each in begun for row in each.rows),
        version=min(each.version for each in begun),
        work=Answering(
            [chunk for each in begun for chunk in each.work.rollouts],
            [chunk for each in begun for chunk in each.work.greedy],
        ),
    )
