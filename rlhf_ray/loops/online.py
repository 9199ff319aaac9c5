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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rlhf_ray.algorithms.kl import AdaptiveKLController, FixedKLController, KLController
from rlhf_ray.config.schema import OnlineSection, SyncSection
from rlhf_ray.data.cursor import Cursor
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.loops.checkpoints import State, restored_cursor, restored_step
from rlhf_ray.loops.sampling import OnlineRoles, Sampler
from rlhf_ray.loops.stage_run import StageRun
from rlhf_ray.reporting.evaluation import EvalRecord, load_records, save_records
from rlhf_ray.roles import Critic, Done, Pending, Policy
from rlhf_ray.seeds import derive_seed
from rlhf_ray.types import Metrics, Prompts, StepInfo

FIRST_KL_LIMIT = 0.02
"""Nats a token by which policy and reference may differ at the first step: their weights are equal, but their
micro-batches may be cut differently, and bfloat16 rounds."""


NOTHING: Pending[Metrics] = Done({})


@dataclass
class OnlineLoop:
    """
    Fields:
        prompts: to train on. held_out: judged at the start, at the end, and every `eval_every` steps.
        starts_at_reference: policy and reference begin with the same weights.
        first_kl_limit: nats a token by which they may differ then; an engine's numerics are its own.
    """

    section: OnlineSection
    sync: SyncSection
    roles: OnlineRoles
    prompts: Prompts
    held_out: Prompts
    run: StageRun
    starts_at_reference: bool
    first_kl_limit: float = FIRST_KL_LIMIT
    sampler: Sampler = field(init=False, repr=False)

    def train(self) -> tuple[list[EvalRecord], list[EvalRecord]]:
        """Run all steps, or those that are left.

        Returns:
            The judgement of held-out answers before and after.
        """
        section, roles, run = self.section, self.roles, self.run
        cursor, kl, start = self.restore()
        run.begin(start, section.num_steps)
        roles.policy.publish(version=start, verify=True)
        sampler = self.sampler = Sampler(section, roles, self.prompts, cursor, run.seed)
        before = self.first_evaluation(start)
        run.restart_clock()
        for step in range(start, section.num_steps):
            sampler.keep_in_flight(step)
            sampled = sampler.take(step)
            own_pass = section.old_logprobs == "forward"
            old_logprobs = roles.policy.logprobs(sampled.rollouts) if own_pass else None
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
            run.save_or_stop(step + 1, self.models, lambda: self.state(kl))
        return before, self.evaluate()

    def is_verified(self, version: int) -> bool:
        return version <= self.sync.verify_first or version % self.sync.verify_every == 0

    def check_first_step(self, step: int, metrics: Metrics) -> None:
        """Before any update the policy is the reference, and a KL that is not 0 is a mistake.

        Raises:
            RlhfRayError: they differ.
        """
        is_same_model = self.starts_at_reference and self.roles.reference is not None
        # The sampler's own log-probs differ from the reference's by the engine's numerics too.
        if step or not is_same_model or self.section.old_logprobs == "sampler":
            return
        if abs(metrics["kl/per_token"]) > self.first_kl_limit:
            raise RlhfRayError(
                f"the KL to the reference is {metrics['kl/per_token']:.3g} nats a token before the first "
                "update, where policy and reference are one model: their log-probs are not computed alike"
            )

    def evaluate(self) -> list[EvalRecord]:
        """One answer to each held-out prompt, sampled as in training, always with the same seed."""
        roles, sampler = self.roles, self.sampler
        sampling = sampler.sampling_one(self.section.temperature)
        seed = derive_seed(self.run.seed)
        rollouts = sampler.whole(roles.generator.generate(self.held_out, sampling, seed))
        judged = sampler.judged(rollouts)
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

    def state(self, kl: KLController) -> State:
        """All that moves besides the models. What is in flight is not saved: its prompts come again."""
        return {
            "cursor": dict(self.sampler.cursor.state(again=self.sampler.in_flight.rows)),
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
