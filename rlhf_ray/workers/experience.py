"""From scored rollouts to a training batch. One process, so that normalisers see the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.algorithms import ALGORITHMS, AdvantageInputs
from rlhf_ray.algorithms.advantages import RewardShaping, RunningMeanStd, TokenRewards, token_rewards, whiten
from rlhf_ray.algorithms.diagnostics import frac_zero_std, reward_length_correlation
from rlhf_ray.algorithms.kl import reference_kl_metrics
from rlhf_ray.algorithms.metrics import finalise
from rlhf_ray.algorithms.mismatch import mismatch_metrics
from rlhf_ray.config.schema import ModelSection, OnlineSection
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.reporting.evaluation import EvalRecord
from rlhf_ray.reporting.lineage import LineageBatch, write_lineage
from rlhf_ray.types import Metrics, Ragged, RLBatch, Rollouts, Scores


class ExperienceWorker:
    """Reward shaping, advantages and returns (`prepare`), and the judgement of held-out answers (`evaluate`).

    Args:
        rollouts_folder: where the lineage of every sample goes, one Parquet file a step.
    """

    def __init__(self, section: OnlineSection, policy: ModelSection, rollouts_folder: Path) -> None:
        torch.set_num_threads(1)
        self.section = section
        self.tokenizer = load_tokenizer(policy)
        self.rollouts_folder = rollouts_folder
        self.reward_scale = RunningMeanStd()

    def prepare(
        self,
        step: int,
        version: int,
        kl_coef: float,
        old_logprobs: Ragged,
        values: Ragged,
        *chunks: Rollouts | Scores | Ragged,
    ) -> tuple[RLBatch, Metrics]:
        """
        Args:
            version: of the weights that sampled every token.
            kl_coef: this step's coefficient, in the reward where the KL belongs there.
            old_logprobs, values: of all rollouts, by the trainer and the critic.
            chunks: n chunks of rollouts, then their n scores, then their n reference log-probs.

        Raises:
            WeightSyncError: a token was sampled by weights of another version.
        """
        rollouts, scores, ref_logprobs = _joined(chunks)
        _check_version(rollouts, version, step)
        shaped = self._shape(rollouts, scores, old_logprobs, ref_logprobs, kl_coef)
        offsets = torch.from_numpy(rollouts.responses.offsets)
        is_trained = torch.from_numpy(scores.is_valid[rollouts.responses.row_ids])
        rewards = shaped.rewards
        if self.section.whiten_rewards:
            rewards = whiten(rewards, is_trained, shift_mean=False)
        advantages, returns = ALGORITHMS[self.section.algorithm].advantages(
            AdvantageInputs(
                rewards=rewards,
                values=torch.tensor(values.values),
                offsets=offsets,
                group_ids=torch.from_numpy(rollouts.prompt_ids),
                gamma=self.section.gamma,
                lam=self.section.lam,
            )
        )
        if self.section.whiten_advantages:
            advantages = whiten(advantages, is_trained)
        batch = RLBatch(
            prompt_ids=rollouts.prompt_ids,
            prompts=rollouts.prompts,
            responses=rollouts.responses,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
            advantages=values.with_values(advantages.numpy()),
            returns=values.with_values(returns.float().numpy()),
            is_trained=values.with_values(is_trained.numpy()),
        )
        self._write_lineage(step, rollouts, scores, batch)
        return batch, self._metrics(rollouts, scores, shaped, batch)

    def _shape(
        self, rollouts: Rollouts, scores: Scores, old_logprobs: Ragged, ref_logprobs: Ragged, kl_coef: float
    ) -> TokenRewards:
        total = torch.tensor(scores.total)
        if self.section.normalize_rewards:
            self.reward_scale.update(total)
            total = self.reward_scale.scale(total)
        in_reward = self.section.kl_placement == "reward"
        shaping = RewardShaping(
            kl_coef=kl_coef if in_reward else 0.0,
            missing_eos_penalty=self.section.missing_eos_penalty,
            reward_clip=self.section.reward_clip,
        )
        return token_rewards(
            total,
            torch.tensor(rollouts.finished),
            torch.tensor(old_logprobs.values),
            torch.tensor(ref_logprobs.values),
            torch.from_numpy(rollouts.responses.offsets),
            shaping,
        )

    def _metrics(self, rollouts: Rollouts, scores: Scores, shaped: TokenRewards, batch: RLBatch) -> Metrics:
        lengths = rollouts.responses.lengths
        offsets = torch.from_numpy(rollouts.responses.offsets)
        trainer, sampler = torch.tensor(batch.old_logprobs.values), torch.tensor(rollouts.logprobs.values)
        reference = torch.tensor(batch.ref_logprobs.values)
        optional = {
            "reward/frac_zero_std": frac_zero_std(scores.total, rollouts.prompt_ids),
            "length/reward_correlation": reward_length_correlation(scores.total, lengths),
        }
        return {
            "reward/mean": float(scores.total.mean()),
            "reward/std": float(scores.total.std()),
            "reward/score": float(shaped.scores.mean()),
            "reward/kl_penalty": float(shaped.kl_penalty.sum() / len(rollouts)),
            "reward/shaped": float(shaped.rewards.sum() / len(rollouts)),
            **_part_metrics(scores),
            **{name: value for name, value in optional.items() if value is not None},
            "length/mean": float(lengths.mean()),
            "length/max": float(lengths.max()),
            "length/truncated_fraction": float(1 - rollouts.finished.mean()),
            "length/stop_fraction": float(rollouts.finished.mean()),
            "perf/num_samples": float(len(rollouts)),
            "perf/generated_tokens": float(lengths.sum()),
            **finalise(reference_kl_metrics(trainer, reference, offsets)),
            **finalise(mismatch_metrics(trainer, sampler, torch.ones_like(trainer, dtype=torch.bool))),
        }

    def _write_lineage(self, step: int, rollouts: Rollouts, scores: Scores, batch: RLBatch) -> None:
        prompts, responses = self._decode(rollouts)
        lineage = LineageBatch(
            rollouts=rollouts,
            scores=scores,
            prompt_texts=prompts,
            response_texts=responses,
            kl=_kl_per_sequence(batch.old_logprobs, batch.ref_logprobs).astype(np.float32),
            advantages=batch.advantages,
        )
        write_lineage(self.rollouts_folder, step, lineage)

    def evaluate(self, logprobs: Ragged, *chunks: Rollouts | Scores | Ragged) -> list[EvalRecord]:
        """Judge answers to held-out prompts.

        Args:
            logprobs: of all of them, by the current policy. chunks: as for `prepare`.
        """
        rollouts, scores, ref_logprobs = _joined(chunks)
        kl = _kl_per_sequence(logprobs, ref_logprobs)
        prompts, completions = self._decode(rollouts)
        return [
            EvalRecord(
                prompt_id=int(rollouts.prompt_ids[i]),
                prompt=prompts[i],
                response=completions[i],
                rewards={name: float(part[i]) for name, part in scores.parts.items()},
                kl=float(kl[i]),
                length=int(rollouts.responses.lengths[i]),
                finished=bool(rollouts.finished[i]),
            )
            for i in range(len(rollouts))
        ]

    def _decode(self, rollouts: Rollouts) -> tuple[list[str], list[str]]:
        prompts = [conversation[-1]["content"] for conversation in rollouts.messages]
        ids = [row.tolist() for row in rollouts.responses]
        return prompts, self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def state_dict(self) -> dict[str, float]:
        return self.reward_scale.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.reward_scale.load_state_dict(state)


def _joined(chunks: Sequence[Rollouts | Scores | Ragged]) -> tuple[Rollouts, Scores, Ragged]:
    third = len(chunks) // 3
    rollouts = Rollouts.concat([c for c in chunks[:third] if isinstance(c, Rollouts)])
    scores = [c for c in chunks[third : 2 * third] if isinstance(c, Scores)]
    reference = Ragged.concat([c for c in chunks[2 * third :] if isinstance(c, Ragged)])
    return rollouts, Scores.concat(scores), reference


def _check_version(rollouts: Rollouts, version: int, step: int) -> None:
    found = np.unique(rollouts.versions.values)
    if not np.array_equal(found, [version]):
        raise WeightSyncError(
            f"step {step}: its tokens were sampled by weights of version {', '.join(map(str, found))}, "
            f"and version {version} was published last; an engine has missed an update"
        )


def _part_metrics(scores: Scores) -> Metrics:
    """Of each source over the samples that it has something to say about; nothing where there are none."""
    metrics: Metrics = dict(scores.events)
    for name, spread in scores.spreads.items():
        if not np.isnan(spread).all():
            metrics[f"reward/{name}/spread"] = float(np.nanmean(spread))
    for name, part in scores.parts.items():
        known = part[~np.isnan(part)]
        if len(known):
            metrics |= {f"reward/{name}/mean": float(known.mean()), f"reward/{name}/std": float(known.std())}
    return metrics


def _kl_per_sequence(logprobs: Ragged, ref_logprobs: Ragged) -> NDArray[np.float64]:
    """[B] nats."""
    difference = logprobs.values.astype(np.float64) - ref_logprobs.values.astype(np.float64)
    return np.bincount(logprobs.row_ids, weights=difference, minlength=len(logprobs)).astype(np.float64)
