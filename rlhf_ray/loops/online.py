"""Reinforcement learning on the policy's own answers: PPO with a critic, and its kin without one.

One step of PPO for language models (Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022):

1. the policy answers a batch of prompts                   rollouts   y ~ pi(. | x)
2. frozen models judge the answers while more arrive       scores     r(x, y)
                                                           reference  log pi_ref(y_t)
3. the models in training look before they move            old        log pi_old(y_t)
                                                           values     V(x, y_<t)
4. every token gets a reward, an advantage and a return    r_t = [t = last] r(x, y) - beta (old - reference)
                                                           A_t by GAE; R_t = A_t + V_t
5. both models take a few steps on the batch               policy: clipped surrogate of pi / pi_old with A
                                                           critic: squared error to R
6. the new weights go to the engines, with a version       publish

The kin (GRPO, RLOO, REINFORCE++, ...) have no values: in 4 they compare the answers to a prompt with each
other. What an algorithm is stands in `algorithms.table` and `config.schema.algorithms`; the loop is one.

With `max_lag` above 0 the engines are at 1 for the next batches while 2 to 6 are done with this one, so its
tokens were sampled by weights that are up to so many versions older. The old log-probs of 3 are those of the
newest weights all the same; what lies between the sampler and pi_old is corrected in 5 (the decoupled
objective: Hilton et al. 2022; Fu et al. 2025).

Arrays stay with the roles: the loop passes handles on and reads small reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rlhf_ray.algorithms import ALGORITHMS
from rlhf_ray.algorithms.kl import AdaptiveKLController, FixedKLController, KLController
from rlhf_ray.config.schema import OnlineSection, SyncSection
from rlhf_ray.data.cursor import Cursor
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.loops.checkpoints import State, restored_cursor, restored_step
from rlhf_ray.loops.in_flight import Begun, InFlight
from rlhf_ray.loops.stage_run import StageRun
from rlhf_ray.reporting.evaluation import EvalRecord, load_records, save_records
from rlhf_ray.roles import (
    Critic,
    Done,
    Experience,
    Generator,
    Pending,
    Policy,
    Reference,
    ScoredChunk,
    Scorer,
)
from rlhf_ray.seeds import derive_seed
from rlhf_ray.types import Metrics, Prompts, Ragged, Rollouts, SamplingSpec, StepInfo

FIRST_KL_LIMIT = 0.02
"""Nats a token by which policy and reference may differ at the first step: their weights are equal, but their
micro-batches may be cut differently, and bfloat16 rounds."""


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
    """What the engines are at, for one batch.

    Fields:
        greedy: the most likely answers to the same prompts, for algorithms that compare with them.
    """

    rollouts: Sequence[Pending[Rollouts]]
    greedy: Sequence[Pending[Rollouts]] = ()


NOTHING: Pending[Metrics] = Done({})


@dataclass
class OnlineLoop:
    """
    Fields:
        prompts: to train on. held_out: judged at the start, at the end, and every `eval_every` steps.
        starts_at_reference: policy and reference begin with the same weights.
    """

    section: OnlineSection
    sync: SyncSection
    roles: OnlineRoles
    prompts: Prompts
    held_out: Prompts
    run: StageRun
    starts_at_reference: bool

    def train(self) -> tuple[list[EvalRecord], list[EvalRecord]]:
        """Run all steps, or those that are left.

        Returns:
            The judgement of held-out answers before and after.
        """
        section, roles, run = self.section, self.roles, self.run
        cursor, kl, start = self.restore()
        run.begin(start, section.num_steps)
        roles.policy.publish(version=start, verify=True)
        before = self.first_evaluation(start)
        run.restart_clock()
        in_flight: InFlight[Answering] = InFlight(section.max_lag)
        for step in range(start, section.num_steps):
            self.keep_in_flight(in_flight, cursor, step)
            sampled = self.judge(in_flight.take(version=step), cursor, step)
            old_logprobs = roles.policy.logprobs(sampled.rollouts) if section.recompute_old_logprobs else None
            values = roles.critic.values(sampled.rollouts) if roles.critic else None
            info = StepInfo(step, version=step, kl_coef=kl.coef)
            batch, report = roles.experience.prepare(
                info, sampled.chunks, old_logprobs, values, sampled.greedy
            )
            critic_report = roles.critic.train_rl(batch, step) if roles.critic else NOTHING
            is_warm = roles.critic is None or step >= section.critic_warmup_steps
            policy_report = roles.policy.train_rl(batch, step, kl.coef) if is_warm else NOTHING
            metrics = {**report.result(), **critic_report.result(), **policy_report.result()}
            metrics |= {"kl/coef": kl.coef, **sampled.metrics}
            self.check_first_step(step, metrics)
            if roles.reference:
                kl.update(metrics["kl/per_sequence"], section.samples_per_step)
            metrics |= roles.policy.publish(version=step + 1, verify=self.is_verified(step + 1))
            metrics |= self.evaluation_metrics(step + 1)
            run.log(step, metrics)
            run.save_or_stop(step + 1, self.models, lambda: self.state(cursor, kl, in_flight))
        return before, self.evaluate()

    def keep_in_flight(self, in_flight: InFlight[Answering], cursor: Cursor, step: int) -> None:
        """The engines are always at (max_lag + 1) batches: that of `step` and the next ones."""
        while not in_flight.is_full and (batch := step + len(in_flight)) < self.section.num_steps:
            rows = cursor.next(self.section.prompts_per_step).tolist()
            in_flight.add(Begun(tuple(rows), version=step, work=self.begin(rows, batch)))

    def begin(self, rows: Sequence[int], batch: int) -> Answering:
        """Let the engines answer. batch: the step that will train on it."""
        if self.section.recipe.dynamic_sampling:
            return Answering(self.sample_round(rows, batch, 0))
        prompts, seed = self.prompts.select(rows), derive_seed(self.run.seed, batch)
        rollouts = self.roles.generator.generate(prompts, self.sampling, seed)
        if not ALGORITHMS[self.section.algorithm].needs_greedy:
            return Answering(rollouts)
        greedy = self.roles.generator.generate(prompts, self.sampling_one(temperature=0.0), seed)
        return Answering(rollouts, greedy)

    def judge(self, begun: Begun[Answering], cursor: Cursor, step: int) -> Sampled:
        """The answers, with what the frozen models say of them."""
        if self.section.recipe.dynamic_sampling:
            return self.judge_informative(begun, cursor, step)
        return Sampled(self.judged(begun.work.rollouts), self.scored(begun.work.greedy))

    def sample_round(self, rows: Sequence[int], step: int, num_rounds: int) -> Sequence[Pending[Rollouts]]:
        seed = derive_seed(self.run.seed, step, num_rounds)
        return self.roles.generator.generate(self.prompts.select(rows), self.sampling, seed)

    def judge_informative(self, begun: Begun[Answering], cursor: Cursor, step: int) -> Sampled:
        """Draw more prompts until enough of them have answers that the rewards tell apart (DAPO: Yu et al.
        2025, section 3.2). Where they do not suffice, others fill the batch up."""
        wanted, experience = self.section.prompts_per_step, self.roles.experience
        scored: list[ScoredChunk] = []
        drawn = set(begun.rows)
        rollouts = begun.work.rollouts
        num_informative = num_rounds = 0
        while rollouts:
            fresh = self.scored(rollouts)
            scored += fresh
            num_informative += sum(experience.num_informative(chunk).result() for chunk in fresh)
            num_rounds += 1
            if num_informative >= wanted or num_rounds >= self.section.max_sampling_rounds:
                break
            rows = [row for row in cursor.next(wanted).tolist() if row not in drawn]
            drawn.update(rows)
            rollouts = self.sample_round(rows, step, num_rounds) if rows else ()
        chosen, scores = experience.select(scored, wanted)
        metrics = {
            "sampling/rounds": float(num_rounds),
            "sampling/informative_fraction": num_informative / len(drawn),
        }
        return Sampled([ScoredChunk(chosen, scores, self.reference_logprobs(chosen))], metrics=metrics)

    def scored(self, rollouts: Sequence[Pending[Rollouts]]) -> list[ScoredChunk]:
        """With rewards, begun as soon as a chunk is there."""
        return [ScoredChunk(chunk, self.roles.scorer.score(chunk), None) for chunk in rollouts]

    def judged(self, rollouts: Sequence[Pending[Rollouts]]) -> list[ScoredChunk]:
        """With rewards and the reference's log-probs."""
        return [
            replace(chunk, ref_logprobs=self.reference_logprobs(chunk.rollouts))
            for chunk in self.scored(rollouts)
        ]

    def reference_logprobs(self, rollouts: Pending[Rollouts]) -> Pending[Ragged] | None:
        reference = self.roles.reference
        return reference.logprobs(rollouts, self.section.temperature) if reference else None

    @property
    def sampling(self) -> SamplingSpec:
        one = self.sampling_one(self.section.temperature)
        return replace(one, num_generations=self.section.num_generations)

    def sampling_one(self, temperature: float) -> SamplingSpec:
        """One answer a prompt; the most likely one at temperature 0."""
        return SamplingSpec(self.section.max_completion_length, temperature=temperature)

    def is_verified(self, version: int) -> bool:
        return version <= self.sync.verify_first or version % self.sync.verify_every == 0

    def check_first_step(self, step: int, metrics: Metrics) -> None:
        """Before any update the policy is the reference, and a KL that is not 0 is a mistake.

        Raises:
            RlhfRayError: they differ.
        """
        is_same_model = self.starts_at_reference and self.roles.reference is not None
        # The sampler's own log-probs differ from the reference's by the engine's numerics too.
        if step or not is_same_model or not self.section.recompute_old_logprobs:
            return
        if abs(metrics["kl/per_token"]) > FIRST_KL_LIMIT:
            raise RlhfRayError(
                f"the KL to the reference is {metrics['kl/per_token']:.3g} nats a token before the first "
                "update, where policy and reference are one model: their log-probs are not computed alike"
            )

    def evaluate(self) -> list[EvalRecord]:
        """One answer to each held-out prompt, sampled as in training, always with the same seed."""
        roles = self.roles
        sampling = self.sampling_one(self.section.temperature)
        rollouts = roles.generator.generate(self.held_out, sampling, seed=derive_seed(self.run.seed))
        judged = self.judged(rollouts)
        logprobs = roles.policy.logprobs(rollouts) if roles.reference else None
        return roles.experience.evaluate(judged, logprobs).result()

    def first_evaluation(self, start: int) -> list[EvalRecord]:
        """Of the policy before training; a resumed run reads what the first one found."""
        path = self.run.folder.eval_path
        if start:
            before, _ = load_records(path)
            return before
        before = self.evaluate()
        save_records(path, before)
        return before

    def evaluation_metrics(self, done: int) -> Metrics:
        every = self.section.eval_every
        if every is None or done % every or done == self.section.num_steps:
            return {}
        return evaluation_means(self.evaluate())

    @property
    def models(self) -> dict[str, Policy | Critic]:
        critic = {"critic": self.roles.critic} if self.roles.critic else {}
        return {"policy": self.roles.policy, **critic}

    def state(self, cursor: Cursor, kl: KLController, in_flight: InFlight[Answering]) -> State:
        """All that moves besides the models. What is in flight is not saved: its prompts come again."""
        return {
            "cursor": dict(cursor.state(again=in_flight.rows)),
            "kl": kl.state_dict(),
            "experience": self.roles.experience.state_dict().result(),
        }

    def restore(self) -> tuple[Cursor, KLController, int]:
        """The state to go on from: that of the newest checkpoint, or the beginning."""
        cursor, kl = Cursor(len(self.prompts), self.run.seed), kl_controller(self.section)
        saved = self.run.checkpoints.latest()
        if saved is None:
            return cursor, kl, 0
        folder, state = saved
        return self._restored(folder, state, kl)

    def _restored(self, folder: Path, state: State, kl: KLController) -> tuple[Cursor, KLController, int]:
        cursor = restored_cursor(state, len(self.prompts))
        self.run.checkpoints.load_models(folder, self.models)
        kl.load_state_dict(state["kl"])  # type: ignore[arg-type]
        self.roles.experience.load_state_dict(state["experience"]).result()  # type: ignore[arg-type]
        return cursor, kl, restored_step(state)


def kl_controller(section: OnlineSection) -> KLController:
    coef = section.recipe.kl_coef
    if section.kl_target is None:
        return FixedKLController(coef)
    return AdaptiveKLController(coef, section.kl_target, section.kl_horizon)


def evaluation_means(records: Sequence[EvalRecord]) -> Metrics:
    """Means over the answers; a reward source is left out where it had nothing to say about any of them."""
    rewards = {
        name: [r.rewards[name] for r in records if not np.isnan(r.rewards[name])]
        for name in records[0].rewards
    }
    kl = float(np.mean([r.kl for r in records]))
    return {
        **{f"eval/reward/{name}": float(np.mean(known)) for name, known in rewards.items() if known},
        **({"eval/kl": kl} if not np.isnan(kl) else {}),
        "eval/length": float(np.mean([r.length for r in records])),
    }
