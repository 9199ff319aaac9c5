"""From scored rollouts to a training batch. One process, so that normalisers see the whole batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.algorithms import AdvantageInputs, Advantages
from rlhf_ray.algorithms.advantages import (
    RewardShaping,
    RunningMeanStd,
    TokenRewards,
    move_turn_rewards,
    token_rewards,
    whiten,
)
from rlhf_ray.algorithms.correction import correction_metrics, importance_weights
from rlhf_ray.algorithms.diagnostics import frac_zero_std, has_signal, reward_length_correlation
from rlhf_ray.algorithms.kl import reference_kl_metrics
from rlhf_ray.algorithms.metrics import finalise
from rlhf_ray.algorithms.mismatch import mismatch_metrics
from rlhf_ray.algorithms.table import trained_mask
from rlhf_ray.config.schema import ModelSection, OnlineSection
from rlhf_ray.errors import EnvironmentFailure
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.reporting.evaluation import EvalRecord
from rlhf_ray.reporting.lineage import LineageBatch, write_lineage
from rlhf_ray.reporting.transcripts import transcripts
from rlhf_ray.types import Metrics, Ragged, RLBatch, Rollouts, Scores, StepInfo
from rlhf_ray.workers.algorithm import algorithm_of, correction_of
from rlhf_ray.workers.sampled import SampledPart, by_prompt, did_not_fail, num_turns
from rlhf_ray.workers.staleness import check_versions, lag_metrics


class ExperienceWorker:
    """Reward shaping, advantages and returns (`prepare`), and the judgement of held-out answers (`evaluate`).

    Args:
        rollouts_folder: where the lineage of every sample goes, one Parquet file a step.
    """

    def __init__(self, section: OnlineSection, policy: ModelSection, rollouts_folder: Path) -> None:
        torch.set_num_threads(1)
        self.section = section
        self.algorithm = algorithm_of(section)
        self.tokenizer = load_tokenizer(policy)
        self.rollouts_folder = rollouts_folder
        self.reward_scale = RunningMeanStd()

    def prepare(
        self,
        info: StepInfo,
        num_chunks: int,
        old_logprobs: Ragged | None,
        values: Ragged | None,
        *columns: Rollouts | Scores | Ragged,
    ) -> tuple[RLBatch, Metrics]:
        """
        Args:
            num_chunks: of rollouts to train on; more of them are greedy answers to the same prompts.
            old_logprobs, values: of all rollouts, by trainer and critic; None as in `roles.Experience`.
            columns: all chunks of rollouts, then their scores, then their reference log-probs if any.

        Raises:
            WeightSyncError: a token was sampled by weights of another version, or of more than `max_lag`
                versions before.
            EnvironmentFailure: there is not one episode whose environment did not fail.
        """
        whole, greedy = _joined(columns, num_chunks)
        part = _sampled_part(whole.rollouts, greedy)
        # What the environment said is taken out here, and put back at the end: nothing in between sees it.
        own = [None if column is None else part.tokens(column) for column in (old_logprobs, values)]
        sampled, metrics = self._prepare_sampled(info, whole.only(part), own[0], own[1], greedy)
        batch = part.put_back(sampled, whole.rollouts)
        self._write_lineage(info.step, whole, batch)
        if self.section.environment is not None:
            metrics |= _environment_metrics(whole.rollouts)
        return batch, metrics

    def _prepare_sampled(
        self,
        info: StepInfo,
        judged: Judged,
        old_logprobs: Ragged | None,
        values: Ragged | None,
        greedy: Judged | None,
    ) -> tuple[RLBatch, Metrics]:
        """`prepare` for responses that are sampled from their first token to their last."""
        rollouts = judged.rollouts
        check_versions(rollouts, info, self.section.max_lag)
        old = rollouts.logprobs if old_logprobs is None else old_logprobs
        reference = old if judged.ref_logprobs is None else judged.ref_logprobs
        if self.section.normalize_rewards:
            self.reward_scale.update(torch.tensor(judged.scores.total[judged.scores.is_valid]))
        shaped = self._shape(judged, old, reference, info.kl_coef)
        found = self._advantages(judged, shaped.rewards, values, greedy)
        is_valid = torch.from_numpy(judged.scores.is_valid[rollouts.responses.row_ids])
        is_trained = trained_mask(found) & is_valid
        advantages = found.advantages
        if self.section.recipe.whiten_advantages:
            advantages = whiten(advantages, is_trained)
        returns = advantages if found.returns is None else found.returns
        weights = self._importance_weights(rollouts, old_logprobs, is_trained)
        tokens = rollouts.responses
        batch = RLBatch(
            prompt_ids=rollouts.prompt_ids,
            prompts=rollouts.prompts,
            responses=tokens,
            old_logprobs=old,
            ref_logprobs=reference,
            values=tokens.with_values(np.zeros_like(old.values)) if values is None else values,
            advantages=tokens.with_values(advantages.float().numpy()),
            returns=tokens.with_values(returns.float().numpy()),
            importance_weights=tokens.with_values(weights.float().numpy()),
            is_trained=tokens.with_values(is_trained.numpy()),
        )
        return batch, {
            **self._metrics(judged, shaped, batch),
            **lag_metrics(rollouts, info),
            **self._mismatch(rollouts, old_logprobs, weights, is_trained),
        }

    def _advantages(
        self, judged: Judged, rewards: torch.Tensor, values: Ragged | None, greedy: Judged | None
    ) -> Advantages:
        rollouts, is_valid = judged.rollouts, judged.scores.is_valid
        if self.section.whiten_rewards:
            mask = torch.from_numpy(is_valid[rollouts.responses.row_ids])
            rewards = whiten(rewards, mask, shift_mean=False)
        # What could not be scored is compared with nothing: a group of its own.
        groups = np.where(is_valid, rollouts.prompt_ids, -1 - np.arange(len(rollouts)))
        inputs = AdvantageInputs(
            rewards=rewards,
            values=torch.zeros_like(rewards) if values is None else torch.tensor(values.values),
            offsets=torch.from_numpy(rollouts.responses.offsets),
            group_ids=torch.from_numpy(groups),
            gamma=self.section.gamma,
            lam=self.section.lam,
            baseline=None if greedy is None else self._of_greedy(greedy, rollouts),
        )
        return self.algorithm.advantages(inputs)

    def _of_greedy(self, greedy: Judged, rollouts: Rollouts) -> torch.Tensor:
        """[B] the reward of the greedy answer to each row's prompt, shaped like those it is compared with."""
        own = greedy.rollouts.logprobs
        scores = self._shape(greedy, own, own, kl_coef=0.0).scores
        rewards = dict(zip(greedy.rollouts.prompt_ids.tolist(), scores.tolist(), strict=True))
        return torch.tensor([rewards[prompt] for prompt in rollouts.prompt_ids.tolist()])

    def _importance_weights(
        self, rollouts: Rollouts, old_logprobs: Ragged | None, is_trained: torch.Tensor
    ) -> torch.Tensor:
        """[R]; 1 where nothing is to be corrected here."""
        correction = correction_of(self.section)
        if old_logprobs is None or correction is None:
            return torch.ones(len(is_trained))
        return importance_weights(
            torch.tensor(old_logprobs.values),
            torch.tensor(rollouts.logprobs.values),
            torch.from_numpy(rollouts.responses.offsets),
            is_trained,
            correction,
        )

    def _mismatch(
        self, rollouts: Rollouts, old_logprobs: Ragged | None, weights: torch.Tensor, is_trained: torch.Tensor
    ) -> Metrics:
        """Nothing where the trainer has not computed its own log-probs: the policy says it then."""
        if old_logprobs is None:
            return {}
        trainer, sampler = torch.tensor(old_logprobs.values), torch.tensor(rollouts.logprobs.values)
        metrics = finalise(mismatch_metrics(trainer, sampler, torch.ones_like(is_trained)))
        if self.section.importance_correction != "none":
            metrics |= finalise(correction_metrics(weights, is_trained))
        return metrics

    def gather(self, *chunks: Rollouts) -> Rollouts:
        """All in one, in the order of the prompts' ids."""
        return by_prompt(Rollouts.concat(chunks))

    def num_informative(self, rollouts: Rollouts, scores: Scores) -> int:
        """Prompts whose answers did not all get the same reward."""
        return len(_informative(rollouts, scores))

    def select(self, num_prompts: int, *columns: Rollouts | Scores) -> tuple[Rollouts, Scores]:
        """The answers to so many of the prompts: first those that were told apart, in the order in which they
        came (DAPO: Yu et al. 2025, section 3.2).

        Args:
            columns: chunks of rollouts, then their scores.
        """
        judged, _ = _joined(columns, len(columns) // 2)
        ids = judged.rollouts.prompt_ids
        order = list(dict.fromkeys(ids.tolist()))
        informative = _informative(judged.rollouts, judged.scores)
        chosen = sorted(order, key=lambda prompt: prompt not in informative)[:num_prompts]
        rows = np.concatenate([np.flatnonzero(ids == prompt) for prompt in chosen])
        return judged.rollouts.select(rows), judged.scores.select(rows)

    def _shape(
        self, judged: Judged, old_logprobs: Ragged, ref_logprobs: Ragged, kl_coef: float
    ) -> TokenRewards:
        section = self.section
        total = torch.tensor(judged.scores.total)
        turns = torch.tensor(judged.rollouts.turn_rewards.values)
        if section.normalize_rewards:
            total = self.reward_scale.scale(total)
            turns = self.reward_scale.scale(turns)
        in_reward = section.recipe.kl_placement == "reward"
        shaping = RewardShaping(
            kl_coef=kl_coef if in_reward else 0.0,
            missing_eos_penalty=section.missing_eos_penalty,
            reward_clip=section.reward_clip,
            overlong_buffer=round(section.recipe.overlong_buffer * section.max_response_length),
            max_length=section.max_response_length,
        )
        offsets = torch.from_numpy(judged.rollouts.responses.offsets)
        shaped = token_rewards(
            total,
            torch.tensor(judged.rollouts.finished),
            torch.tensor(old_logprobs.values),
            torch.tensor(ref_logprobs.values),
            offsets,
            shaping,
        )
        return replace(shaped, rewards=move_turn_rewards(shaped.rewards, turns, offsets))

    def _metrics(self, judged: Judged, shaped: TokenRewards, batch: RLBatch) -> Metrics:
        rollouts, scores = judged.rollouts, judged.scores
        lengths = rollouts.responses.lengths
        is_late = self.section.old_logprobs == "update"  # the policy says it then, of its own log-probs
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
            **(_kl_metrics(batch) if judged.ref_logprobs is not None and not is_late else {}),
        }

    def _write_lineage(self, step: int, judged: Judged, batch: RLBatch) -> None:
        prompts, responses = self._decode(judged.rollouts)
        reference = None if judged.ref_logprobs is None else batch.ref_logprobs
        lineage = LineageBatch(
            rollouts=judged.rollouts,
            scores=judged.scores,
            prompt_texts=prompts,
            response_texts=responses,
            kl=_kl_per_sequence(batch.old_logprobs, reference).astype(np.float32),
            advantages=batch.advantages.masked(judged.rollouts.sampled),
        )
        write_lineage(self.rollouts_folder, step, lineage)

    def evaluate(self, logprobs: Ragged | None, *columns: Rollouts | Scores | Ragged) -> list[EvalRecord]:
        """Judge answers to held-out prompts.

        Args:
            logprobs: of all of them, by the current policy; None where there is no reference.
            columns: as for `prepare`.
        """
        judged, _ = _joined(columns, sum(isinstance(column, Rollouts) for column in columns))
        rollouts, scores = judged.rollouts, judged.scores
        own, reference = rollouts.logprobs if logprobs is None else logprobs, judged.ref_logprobs
        kl = _kl_per_sequence(
            own.masked(rollouts.sampled), None if reference is None else reference.masked(rollouts.sampled)
        )
        lengths = rollouts.responses.masked(rollouts.sampled).lengths
        is_judged = did_not_fail(rollouts)
        prompts, completions = self._decode(rollouts)
        return [
            EvalRecord(
                prompt_id=int(rollouts.prompt_ids[i]),
                prompt=prompts[i],
                response=completions[i],
                rewards={
                    name: float(part[i]) if is_judged[i] else math.nan for name, part in scores.parts.items()
                },
                kl=float(kl[i]),
                length=int(lengths[i]),
                finished=bool(rollouts.finished[i]),
            )
            for i in range(len(rollouts))
        ]

    def _decode(self, rollouts: Rollouts) -> tuple[list[str], list[str]]:
        prompts = [conversation[-1]["content"] for conversation in rollouts.messages]
        return prompts, transcripts(rollouts, self.tokenizer)

    def state_dict(self) -> dict[str, float]:
        return self.reward_scale.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.reward_scale.load_state_dict(state)


@dataclass(frozen=True)
class Judged:
    """Chunks put together. ref_logprobs: None where there is no reference."""

    rollouts: Rollouts
    scores: Scores
    ref_logprobs: Ragged | None

    def only(self, part: SampledPart) -> Judged:
        reference = None if self.ref_logprobs is None else part.tokens(self.ref_logprobs)
        return Judged(part.rollouts(self.rollouts), self.scores.select(part.rows), reference)


def _sampled_part(rollouts: Rollouts, greedy: Judged | None) -> SampledPart:
    """With the answers whose prompt has a greedy one to compare with, where there are greedy ones."""
    part = SampledPart.of(rollouts, None if greedy is None else greedy.rollouts)
    if not len(part.rows):
        failures = [*rollouts.failures, *(greedy.rollouts.failures if greedy else ())]
        first = next(failure for failure in failures if failure is not None)
        raise EnvironmentFailure(f"no episode of this step can be trained on; the first failure: {first}")
    return part


def _environment_metrics(rollouts: Rollouts) -> Metrics:
    return {
        "environment/turns": float(num_turns(rollouts).mean()),
        "environment/observation_tokens": float((~rollouts.sampled).sum() / len(rollouts)),
        "environment/failed_fraction": float(1 - did_not_fail(rollouts).mean()),
    }


def _joined(columns: Sequence[Rollouts | Scores | Ragged], num_chunks: int) -> tuple[Judged, Judged | None]:
    """The first `num_chunks` chunks, and those after them if there are any."""
    rollouts = [c for c in columns if isinstance(c, Rollouts)]
    scores = [c for c in columns if isinstance(c, Scores)]
    reference = [c for c in columns if isinstance(c, Ragged)]
    parts = [
        Judged(
            Rollouts.concat(rollouts[part]),
            Scores.concat(scores[part]),
            Ragged.concat(reference[part]) if reference[part] else None,
        )
        for part in (slice(num_chunks), slice(num_chunks, None))
        if rollouts[part]
    ]
    return parts[0], parts[1] if len(parts) > 1 else None


def _informative(rollouts: Rollouts, scores: Scores) -> set[int]:
    """Ids of the prompts whose answers, as far as they could be scored, did not all get the same reward."""
    is_judged = did_not_fail(rollouts) & scores.is_valid
    ids = rollouts.prompt_ids[is_judged]
    return set(np.unique(ids)[has_signal(scores.total[is_judged], ids)].tolist())


def _kl_metrics(batch: RLBatch) -> Metrics:
    policy, reference = torch.tensor(batch.old_logprobs.values), torch.tensor(batch.ref_logprobs.values)
    return finalise(reference_kl_metrics(policy, reference, torch.from_numpy(batch.responses.offsets)))


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


def _kl_per_sequence(logprobs: Ragged, ref_logprobs: Ragged | None) -> NDArray[np.float64]:
    """[B] nats; NaN where there is no reference."""
    if ref_logprobs is None:
        return np.full(len(logprobs), np.nan)
    difference = logprobs.values.astype(np.float64) - ref_logprobs.values.astype(np.float64)
    return np.bincount(logprobs.row_ids, weights=difference, minlength=len(logprobs)).astype(np.float64)
