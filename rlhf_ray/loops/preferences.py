"""Collecting preferences: the policy answers, annotators choose, and a dataset of pairs comes out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, cast

import krippendorff
import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.schema import ConstitutionAnnotator, PreferencesSection
from rlhf_ray.data.constitution import Constitution
from rlhf_ray.data.formats import PreferenceExample
from rlhf_ray.errors import DataError
from rlhf_ray.loops.parts import Parts
from rlhf_ray.loops.stage_run import StageRun, num_logged
from rlhf_ray.reporting.files import dump_line, read_lines, write_text
from rlhf_ray.roles import Generator, Pending
from rlhf_ray.seeds import derive_seed
from rlhf_ray.types import JudgedPair, Judgement, Metrics, Prompts, Rollouts, SamplingSpec
from rlhf_ray.workers.feedback import feedback_metrics

DATASET_FILE = "preferences.jsonl"


class Annotators(Protocol):
    def annotate(self, rollouts: Pending[Rollouts]) -> Pending[list[JudgedPair]]: ...


class Feedback(Protocol):
    section: ConstitutionAnnotator
    constitution: Constitution

    def judge(self, pairs: Sequence[JudgedPair]) -> list[JudgedPair]:
        """The pairs with one more opinion."""
        ...


@dataclass(frozen=True)
class PreferencesLoop:
    """Answers every prompt once. A file a step keeps its pairs, so that a stopped run can go on.

    Fields:
        annotators: pair up the answers, and vote. feedback: models that judge the pairs.
    """

    section: PreferencesSection
    generator: Generator
    annotators: Annotators
    prompts: Prompts
    run: StageRun
    feedback: Sequence[Feedback] = ()

    def __call__(self) -> list[JudgedPair]:
        run, parts = self.run, self.parts
        parts.check_same_origin()
        # A run may have been cut off between the file of a step and its metrics, which are then made of it.
        start = min(len(parts.done()), num_logged(run.folder))
        run.begin(start, len(parts))
        for step, rows in parts.left(start):
            if parts.path(step).exists():
                judged = read_part(parts.path(step))
            else:
                judged = self._judge(step, rows)
                write_text(parts.path(step), "".join(dump_line(asdict(pair)) for pair in judged))
            counts = {"preferences/prompts": float(len(rows))}
            run.log(step, counts | agreement(judged) | feedback_metrics(judged))
            run.stop_if_asked(step + 1)
        return [pair for part in parts.done() for pair in read_part(part)]

    def _judge(self, step: int, rows: NDArray[np.int64]) -> list[JudgedPair]:
        seed = derive_seed(self.run.seed, step)
        rollouts = self.generator.generate(self.prompts.select(rows), self.sampling, seed)
        judged = [pair for chunk in rollouts for pair in self.annotators.annotate(chunk).result()]
        for model in self.feedback:
            judged = model.judge(judged)
        return judged

    @property
    def parts(self) -> Parts:
        principles = {
            f"annotator {model.section.name}": model.constitution.fingerprint for model in self.feedback
        }
        return Parts(
            self.run.folder.rollouts, "pairs", self.prompts, self.section.prompts_per_step, principles
        )

    @property
    def sampling(self) -> SamplingSpec:
        section = self.section
        return SamplingSpec(
            max_completion_length=section.max_completion_length,
            temperature=section.temperature,
            top_p=section.top_p,
            num_generations=section.num_generations,
        )


def read_part(path: Path) -> list[JudgedPair]:
    pairs = []
    for row in read_lines(path):
        pair = JudgedPair(**row)  # type: ignore[arg-type]
        said = cast(list[dict[str, object]], row["judgements"])
        pairs.append(
            JudgedPair(
                prompt_id=pair.prompt_id,
                messages=tuple(pair.messages),
                answers=(pair.answers[0], pair.answers[1]),
                votes=pair.votes,
                gold={name: (both[0], both[1]) for name, both in pair.gold.items()},
                probabilities=pair.probabilities,
                judgements=tuple(Judgement(**each) for each in said),  # type: ignore[arg-type]
            )
        )
    return pairs


def judged_by_people(name: str, examples: Sequence[PreferenceExample]) -> list[JudgedPair]:
    """Existing human preferences as pairs with one annotator's vote, and with its probability where the
    dataset gives a `soft_label` below 1."""
    return [
        JudgedPair(
            prompt_id=example.id,
            messages=tuple(example.messages),
            answers=(example.rejected, example.chosen),
            votes={name: 1} if example.soft_label > 0.5 else {},
            gold={},
            probabilities={name: example.soft_label} if example.soft_label < 1 else {},
        )
        for example in examples
    ]


def agreement(pairs: Sequence[JudgedPair]) -> Metrics:
    """How far the annotators agree.

    `preferences/agreement` is the share of pairs of votes on the same pair of answers that are equal;
    `preferences/krippendorff_alpha` corrects for chance (Krippendorff 2011, nominal): 1 is perfect, 0 is
    chance. Both are left out where no pair has two votes.
    """
    names = sorted({name for pair in pairs for name in pair.votes})
    metrics: Metrics = {"preferences/pairs": float(len(pairs))}
    golds = [both for pair in pairs for both in pair.gold.values()]
    if golds:
        metrics["preferences/gold_mean"] = float(np.mean(golds))
    if len(names) < 2:
        return metrics
    votes = np.array([[pair.votes.get(name, np.nan) for pair in pairs] for name in names], dtype=np.float64)
    # People and simulated annotators, for example, judge different pairs; one vote says nothing of agreement.
    votes = votes[:, (~np.isnan(votes)).sum(axis=0) > 1]
    if not votes.size:
        return metrics
    equal = [
        (votes[a] == votes[b])[~np.isnan(votes[a]) & ~np.isnan(votes[b])]
        for a in range(len(names))
        for b in range(a)
    ]
    metrics["preferences/agreement"] = float(np.concatenate(equal).mean())
    # The statistic is not defined where only one kind of vote was ever cast.
    if len(np.unique(votes[~np.isnan(votes)])) > 1:
        metrics["preferences/krippendorff_alpha"] = float(
            krippendorff.alpha(reliability_data=votes, level_of_measurement="nominal")
        )
    return metrics


def write_dataset(path: Path, pairs: Sequence[JudgedPair]) -> int:
    """Write the pairs that have a winner in TRL's conversational format; returns how many.

    Besides `prompt`, `chosen`, `rejected`: `margin` (lead of the winner, 0 to 1), `votes` (annotator ->
    whether it chose the winner); where an annotator gave more than a vote `soft_label`, P(chosen is better),
    0.5 to 1, as the mean over annotators; from simulated annotators `gold_chosen` and `gold_rejected` by the
    first.

    Raises:
        DataError: every pair is a draw, or there is none.
    """
    lines = []
    for pair in pairs:
        winner = pair.preferred
        if winner is None:
            continue
        row: dict[str, object] = {
            "prompt": list(pair.messages),
            "chosen": [{"role": "assistant", "content": pair.answers[winner]}],
            "rejected": [{"role": "assistant", "content": pair.answers[1 - winner]}],
            "margin": abs(pair.lead),
            "votes": {name: int(vote == winner) for name, vote in pair.votes.items()},
        }
        if pair.probabilities:
            row["soft_label"] = (1 + abs(pair.lead)) / 2
        if pair.gold:
            gold = next(iter(pair.gold.values()))
            row |= {"gold_chosen": gold[winner], "gold_rejected": gold[1 - winner]}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    if not lines:
        raise DataError(
            f"{path.name}: no pair of different answers has a winner; ask for more num_generations"
        )
    write_text(path, "".join(lines))
    return len(lines)
