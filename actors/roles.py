"""The roles of `rlhf_ray.roles`, played by groups of actors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from actors.calls import Remote, Task
from actors.group import GENERATE, ActorGroup
from actors.transfer import Transfer
from rlhf_ray.config.schema import SyncSection
from rlhf_ray.errors import WeightSyncError, WorkerLost
from rlhf_ray.reporting.evaluation import EvalRecord
from rlhf_ray.roles import Done, Pending, Referenced, ScoredChunk
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
from rlhf_ray.weights.verify import Probe, ProbeHistory


class RemoteGenerator:
    """Engines; prompts are dealt out in equal consecutive shares."""

    streams = False

    def __init__(self, group: ActorGroup) -> None:
        self.group = group
        self._last: list[Remote[object]] = []

    def generate(self, prompts: Prompts, sampling: SamplingSpec, seed: int) -> Sequence[Pending[Rollouts]]:
        shares = [rows for rows in np.array_split(np.arange(len(prompts)), len(self.group)) if len(rows)]
        args = [(prompts.select(rows), sampling, seed) for rows in shares]
        self._last = self.group.call_each("generate", args, kind=GENERATE)
        return cast(Sequence[Pending[Rollouts]], self._last)

    def wait(self) -> None:
        """Until the engines have answered all that they are at."""
        tasks = [task for call in self._last for task in call.tasks]
        self.group.timeline.open.wait_for_sent(tasks, self.group.timeout)

    def token_logprobs(self, sequences: Ragged) -> Sequence[Pending[Ragged]]:
        shares = [rows for rows in np.array_split(np.arange(len(sequences)), len(self.group)) if len(rows)]
        args = [(sequences.select(rows),) for rows in shares]
        return cast(Sequence[Pending[Ragged]], self.group.call_each("token_logprobs", args, kind="feedback"))

    def probe(self, sequences: Ragged) -> Sequence[Pending[Ragged]]:
        """Log-probs of all tokens after each row's first, by every engine."""
        return cast(
            Sequence[Pending[Ragged]],
            self.group.call_each("token_logprobs", [(sequences,)] * len(self.group), kind="verify"),
        )


@dataclass(frozen=True)
class Outstanding:
    """What was asked and is not answered. ticket: by which it is given up. tokens: at most."""

    task: Task
    ticket: int
    tokens: int


class RemoteStreamingGenerator(RemoteGenerator):
    """Engines that are never drained; every prompt goes to the one that has the least to do, counted in the
    tokens that it may still have to make."""

    streams = True

    def __init__(self, group: ActorGroup) -> None:
        super().__init__(group)
        self._outstanding: dict[Task, Outstanding] = {}
        self._tickets = itertools.count()

    def generate(self, prompts: Prompts, sampling: SamplingSpec, seed: int) -> Sequence[Pending[Rollouts]]:
        loads = self._loads()
        ranks = self.group.in_service or list(range(len(self.group)))
        calls = []
        for row, prompt in enumerate(prompts.token_ids):
            rank = ranks[int(np.argmin(loads[ranks]))]
            ticket = next(self._tickets)
            call = self.group.call_rank(
                rank, "generate", prompts.select([row]), sampling, seed, ticket, kind=GENERATE
            )
            tokens = sampling.num_generations * (len(prompt) + sampling.max_completion_length)
            loads[rank] += tokens
            self._outstanding[call.tasks[0]] = Outstanding(call.tasks[0], ticket, tokens)
            calls.append(call)
        return cast(Sequence[Pending[Rollouts]], calls)

    def wait(self) -> None:
        """Weights change in flight: nobody waits for answers before they do."""

    def first_done(self, chunks: Sequence[Pending[Rollouts]], count: int) -> Sequence[int]:
        tasks = [cast(Remote[Rollouts], chunk).tasks[0] for chunk in chunks]
        return self.group.timeline.open.wait_for_first(tasks, count, self.group.timeout)

    def give_up(self, chunks: Sequence[Pending[Rollouts]]) -> None:
        self._forget_ended()
        tickets: dict[int, list[int]] = {}
        for chunk in chunks:
            known = self._outstanding.get(cast(Remote[Rollouts], chunk).tasks[0])
            if known is not None:
                known.task.is_wanted = False
                tickets.setdefault(known.task.at, []).append(known.ticket)
        for rank, own in tickets.items():
            self.group.call_rank(rank, "abort", own)

    def _loads(self) -> NDArray[np.int64]:
        """Tokens of each engine."""
        self._forget_ended()
        loads = np.zeros(len(self.group), dtype=np.int64)
        for call in self._outstanding.values():
            loads[call.task.at] += call.tokens
        return loads

    def _forget_ended(self) -> None:
        calls = self.group.timeline.open
        calls.settle_ended()
        self._outstanding = {task: own for task, own in self._outstanding.items() if calls.is_open(task)}


class RemoteScorer:
    """The reward sources of one actor, which adds what the judge says to its own."""

    def __init__(self, group: ActorGroup, judge: ActorGroup | None = None) -> None:
        self.group = group
        self.judge = judge

    def score(self, rollouts: Pending[Rollouts]) -> Pending[Scores]:
        judged = [self.judge.call("score", rollouts, kind="judge")] if self.judge else []
        return cast(Pending[Scores], self.group.call("score", rollouts, *judged, kind="score"))


class RemoteReference:
    """Args: is_served: whether the actors are engines, each with all of the model."""

    def __init__(self, group: ActorGroup, *, is_served: bool = False) -> None:
        self.call = group.call_next if is_served else group.call

    def logprobs(self, rollouts: Pending[Rollouts], temperature: float) -> Pending[Ragged]:
        return cast(Pending[Ragged], self.call("logprobs", rollouts, temperature, kind="reference"))


class RemoteAdapterReference:
    """The policy without its adapters, in place of a model of its own. Args: group: the policy's."""

    def __init__(self, group: ActorGroup) -> None:
        self.group = group

    def logprobs(self, rollouts: Pending[Rollouts], temperature: float) -> Pending[Ragged]:
        logprobs = self.group.call("reference_logprobs", rollouts, temperature, kind="reference")
        return cast(Pending[Ragged], logprobs)


class RemotePreferenceReference:
    """Args: as of `RemoteReference`."""

    def __init__(self, group: ActorGroup, *, is_served: bool = False) -> None:
        self.call = group.call_next if is_served else group.call

    def answer(self, batch: Pending[Referenced]) -> Pending[Referenced]:
        return cast(Pending[Referenced], self.call("answer", batch, kind="reference"))


class RemoteTrained:
    def __init__(self, group: ActorGroup) -> None:
        self.group = group

    def save_model(self, folder: Path) -> Pending[None]:
        return cast(Pending[None], self.group.call("save_model", folder))

    def save_state(self, folder: Path) -> Pending[None]:
        return cast(Pending[None], self.group.call("save_state", folder, kind="save"))

    def load_state(self, folder: Path) -> Pending[None]:
        return cast(Pending[None], self.group.call("load_state", folder))


class RemotePolicy(RemoteTrained):
    """
    Args:
        engines: where weights are published; None in stages without generation.
        probe: token sequences on which engine and trainer must agree after a sync.
        transfer: the way there; None where it was made before and is not made anew.
    """

    def __init__(
        self,
        group: ActorGroup,
        sync: SyncSection,
        engines: RemoteGenerator | None = None,
        probe: Ragged | None = None,
        transfer: Transfer | None = None,
    ) -> None:
        super().__init__(group)
        self.engines = engines
        self.probe = probe
        self.sync = sync
        self.transfer = transfer
        num_engines = len(engines.group) if engines else 0
        self._histories = [ProbeHistory(sync.tolerance) for _ in range(num_engines)]
        self._published: int | None = None
        self._trained: tuple[Task, ...] = ()
        if engines is not None and transfer is not None:
            engines.group.refresh = self._publish_again

    def logprobs(self, chunks: Sequence[Pending[Rollouts]]) -> Pending[Ragged]:
        return cast(Pending[Ragged], self.group.call("logprobs", *chunks, kind="old_logprobs"))

    def train_rl(self, batch: Pending[RLBatch], step: int, kl_coef: float) -> Pending[Metrics]:
        call = self.group.call("train_rl", batch, step, kl_coef, kind="train_policy")
        self._trained = call.tasks
        return cast(Pending[Metrics], call)

    def train_sft(self, batch: Pending[SFTBatch]) -> Pending[Metrics]:
        return cast(Pending[Metrics], self.group.call("train_sft", batch, kind="train_policy"))

    def evaluate_sft(self, batch: Pending[SFTBatch]) -> Pending[Metrics]:
        return cast(Pending[Metrics], self.group.call("evaluate_sft", batch))

    def publish(self, version: int, verify: bool) -> Metrics:
        if self.engines is not None:
            # An engine takes weights when it has answered what it is at: until then the wait is for it.
            self.engines.wait()
        metrics = self._send(version)
        self._published, self._trained = version, ()
        return {**metrics, **self._verify(self._probed())} if verify else metrics

    def _send(self, version: int) -> Metrics:
        """Publish, and with new engines once more where one died over it: the others hold neither the old
        weights nor the new ones then."""
        while True:
            starts = self.engines.group.num_starts[:] if self.engines else []
            try:
                if self.transfer is not None:
                    self.transfer.join()
                metrics = cast(Remote[Metrics], self.group.call("publish", version, kind="sync")).result()
                break
            except WeightSyncError as failure:
                if self.engines is None or self.transfer is None:
                    raise
                self._start_all_again(self.engines.group, starts, failure)
        if self.engines is not None and self.transfer is not None:
            self.engines.group.note_weights(self.transfer.joined)
        return metrics

    def _start_all_again(self, engines: ActorGroup, starts: Sequence[int], failure: WeightSyncError) -> None:
        """Args: starts: how often each engine had been started before. Raises: the failure, if none died."""
        engines.gpus()  # who does not answer is found dead, and replaced
        if engines.num_starts == starts:
            raise failure
        for rank, before in enumerate(starts):
            if engines.num_starts[rank] == before:
                cause = WorkerLost(f"{engines.label(rank)}: half of an update of its weights was lost")
                engines.timeline.open.start_again(engines, rank, cause)

    def _publish_again(self) -> None:
        """What is current, to engines of which there was none left.

        Raises:
            WorkerLost: the trainer does not hold those weights any more.
        """
        if self._published is None or any(task.is_sent for task in self._trained):
            raise WorkerLost("every engine is lost, and the policy has been trained since it was published")
        if self.probe is None:
            self._send(self._published)
            return
        probed = self._probed()
        probed.result()  # once engines are in service, what waited for them goes on, training too
        self._send(self._published)
        self._verify(probed)

    def _probed(self) -> Remote[Ragged]:
        return cast(Remote[Ragged], self.group.call("probe", self.probe, kind="verify"))

    def _verify(self, probed: Pending[Ragged]) -> Metrics:
        """Compare every engine with the trainer as it was `probed`; the metrics are the worst engine's.

        Raises:
            WeightSyncError: an engine does not hold what was published.
        """
        assert self.engines is not None and self.probe is not None
        pending = self.engines.probe(self.probe)
        reports = [
            history.check(Probe(engine=engine.result(), trainer=probed.result()))
            for history, engine in zip(self._histories, pending, strict=True)
        ]
        return max(reports, key=lambda report: report.mean).metrics()


class RemoteCritic(RemoteTrained):
    def values(self, chunks: Sequence[Pending[Rollouts]]) -> Pending[Ragged]:
        return cast(Pending[Ragged], self.group.call("values", *chunks, kind="values"))

    def train_rl(self, batch: Pending[RLBatch], step: int) -> Pending[Metrics]:
        return cast(Pending[Metrics], self.group.call("train_rl", batch, step, kind="train_critic"))


class RemoteRewardTrainer(RemoteTrained):
    def train_pairs(self, batch: Pending[PairBatch]) -> Pending[Metrics]:
        return cast(Pending[Metrics], self.group.call("train_pairs", batch, kind="train_reward"))

    def score_pairs(self, batch: Pending[PairBatch]) -> Pending[tuple[Ragged, Ragged]]:
        return cast(Pending[tuple[Ragged, Ragged]], self.group.call("score_pairs", batch))


class RemotePreferenceTrainer(RemoteTrained):
    def train_pairs(self, batch: Pending[ReferencedPairs]) -> Pending[Metrics]:
        return cast(Pending[Metrics], self.group.call("train_pairs", batch, kind="train_policy"))

    def train_answers(self, batch: Pending[LabelledAnswers]) -> Pending[Metrics]:
        return cast(Pending[Metrics], self.group.call("train_answers", batch, kind="train_policy"))

    def score_pairs(self, batch: Pending[ReferencedPairs]) -> Pending[tuple[Ragged, Ragged]]:
        return cast(Pending[tuple[Ragged, Ragged]], self.group.call("score_pairs", batch))

    def score_answers(self, batch: Pending[LabelledAnswers]) -> Pending[Ragged]:
        return cast(Pending[Ragged], self.group.call("score_answers", batch))


class RemoteAnnotators:
    def __init__(self, group: ActorGroup) -> None:
        self.group = group

    def annotate(self, rollouts: Pending[Rollouts]) -> Pending[list[JudgedPair]]:
        return cast(Pending[list[JudgedPair]], self.group.call("annotate", rollouts, kind="score"))


class RemoteExperience:
    def __init__(self, group: ActorGroup) -> None:
        self.group = group

    def prepare(
        self,
        info: StepInfo,
        chunks: Sequence[ScoredChunk],
        old_logprobs: Pending[Ragged] | None,
        values: Pending[Ragged] | None,
        greedy: Sequence[ScoredChunk] = (),
    ) -> tuple[Pending[RLBatch], Pending[Metrics]]:
        batch, metrics = self.group.call_pair(
            "prepare",
            info,
            len(chunks),
            old_logprobs,
            values,
            *_columns([*chunks, *greedy]),
            kind="prepare",
        )
        return cast(Pending[RLBatch], batch), cast(Pending[Metrics], metrics)

    def gather(self, chunks: Sequence[Pending[Rollouts]]) -> Pending[Rollouts]:
        return cast(Pending[Rollouts], self.group.call("gather", *chunks, kind="prepare"))

    def num_informative(self, chunk: ScoredChunk) -> Pending[int]:
        return cast(
            Pending[int],
            self.group.call("num_informative", chunk.rollouts, chunk.scores, kind="prepare"),
        )

    def select(
        self, chunks: Sequence[ScoredChunk], num_prompts: int
    ) -> tuple[Pending[Rollouts], Pending[Scores]]:
        rollouts, scores = self.group.call_pair("select", num_prompts, *_columns(chunks), kind="prepare")
        return cast(Pending[Rollouts], rollouts), cast(Pending[Scores], scores)

    def evaluate(
        self, chunks: Sequence[ScoredChunk], logprobs: Pending[Ragged] | None
    ) -> Pending[list[EvalRecord]]:
        return cast(Pending[list[EvalRecord]], self.group.call("evaluate", logprobs, *_columns(chunks)))

    def state_dict(self) -> Pending[dict[str, float]]:
        return cast(Pending[dict[str, float]], self.group.call("state_dict"))

    def load_state_dict(self, state: dict[str, float]) -> Pending[None]:
        return cast(Pending[None], self.group.call("load_state_dict", Done(state)))


def _columns(chunks: Sequence[ScoredChunk]) -> list[object]:
    """Side by side, as arguments of a remote call: all rollouts, all scores, all reference log-probs."""
    reference = [chunk.ref_logprobs for chunk in chunks if chunk.ref_logprobs is not None]
    return [*[chunk.rollouts for chunk in chunks], *[chunk.scores for chunk in chunks], *reference]
