"""The same GRPO work by this project, by TRL's GRPOTrainer and by a plain script without Ray.

rlhf-ray bench end-to-end --json end-to-end.json --plot docs/studies/end-to-end.png --folder runs/end-to-end

The task is that of configs/grpo-arithmetic.yaml: sums, a model of 135M parameters, and in a step 16
questions, 8 answers to each and two optimizer steps. Every arm gets the same questions in the same order, the
same model, reward, loss, learning rate, threads, and budget of tokens a pass. Two cases:

- `12 tokens`: every answer has 12 tokens. The arms learn for some steps; what they reach is compared too.
- `to 64 tokens`: answers end where they end, 64 at the latest, so lengths differ, as they do in practice.

Lengths are fixed by a model whose end-of-text is a token that it never writes; nothing else about it differs,
and no arm needs an option for it.

Each arm runs as a process of its own, in turn: script, TRL, ours, ours, TRL, script, so that each baseline
and ours stand in the order A B B A. The last three repeat the first three; where the arms learn, with another
seed. Start-up is not counted, nor is the first step of a run. Step i of our first run is paired with step i
of the baseline's first, and so are the second ones; the control is step i of the baseline's first run by that
of its second. Compared are tokens a second, of questions and answers without padding, over whole steps:
generation, reward, training, and the new weights in the engine. Questions, tokens that were trained on and
fixed lengths must be exactly those of ours. What is drawn by lot may differ: where lengths do by more than
5 % in all, or the rewards reached by more than 0.15, it is said.

What the peers are stands in benchmarks/peers/. Ours is `rlhf-ray train` as a user runs it, with its
verification of the engine's weights and its record of every sample; only evaluation between steps is off.
With --folder an arm that is done is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks.drawing import drawn
from benchmarks.measure import GIB
from benchmarks.paired import Goal, Options, Result, run_claim, single
from benchmarks.peers.arms import OURS, WARMUP, ArmRun, endless_model, run_arm
from rlhf_ray.config.schema import ModelSection
from rlhf_ray.errors import RlhfRayError, UserError
from rlhf_ray.models.loading import materialise

CLAIM = "end-to-end"
CONFIG = "configs/grpo-arithmetic.yaml"
ARMS = ("script", "TRL", OURS)
GOALS = {"TRL": Goal(">=", 3.0), "script": Goal(">=", 0.95)}
LENGTHS_DIFFER = 0.05
REWARDS_DIFFER = 0.15


@dataclass(frozen=True)
class Case:
    """
    Fields:
        tokens: an answer's; the most that it may have where they are not fixed.
        learns: for `LEARNING_STEPS`, and what is reached is compared.
    """

    name: str
    tokens: int
    is_fixed: bool
    learns: bool = False


CASES = (
    Case("12 tokens", 12, True, learns=True),
    Case("to 64 tokens", 64, False),
)
LEARNING_STEPS = 8


Runs = Mapping[str, Sequence[ArmRun]]
"""Arm -> its runs, one a seed."""


def overrides_of(case: Case, num_steps: int, seed: int, options: Options, model: str) -> list[str]:
    """What tells our run from the configuration."""
    small = ["online.prompts_per_step=2", "online.num_generations=2"] if options.quick else []
    return [
        f"seed={seed}",
        f"model.path={model}",
        f"online.num_steps={num_steps}",
        f"online.max_completion_length={case.tokens}",
        "online.loss_aggregation=token",
        "online.eval_every=null",
        "online.eval_dataset.limit=2",  # judged before the first step and after the last
        "checkpoint.every=null",
        *small,
    ]


# what is made of them


def check_same_work(case: Case, runs: Runs) -> None:
    """
    Raises:
        RlhfRayError: an arm did other work than ours; says what.
    """
    mistakes = []
    for arm, number, run, our_run in beside_ours(runs):
        name = f"{case.name}, {arm}, run {number}"
        if [(s.prompts, s.answers) for s in run.steps] != [(s.prompts, s.answers) for s in our_run.steps]:
            mistakes.append(f"{name}: other questions, or another order")
        for index, step in enumerate(run.steps):
            sampled, trained = step.answer_tokens, step.trained_tokens
            if trained != sampled:
                mistakes.append(f"{name}, step {index}: {sampled} tokens sampled, {trained} trained on")
            if case.is_fixed and sampled != step.answers * case.tokens:
                mistakes.append(f"{name}, step {index}: {sampled} tokens in {step.answers} answers")
    if mistakes:
        raise RlhfRayError("the arms did not do the same work:\n  " + "\n  ".join(mistakes))


def differences(case: Case, runs: Runs) -> list[str]:
    """Where chance has done more than it should: lengths, where they are free, and what was learned."""
    found = []
    for arm, number, run, our_run in beside_ours(runs):
        tokens, ours = (sum(step.tokens for step in r.steps) for r in (run, our_run))
        if abs(tokens / ours - 1) > LENGTHS_DIFFER:
            found.append(f"{case.name}, {arm}, run {number}: {tokens} tokens where ours did {ours}")
    reached = {arm: float(np.mean([run.reward_reached for run in theirs])) for arm, theirs in runs.items()}
    is_long = len(runs[OURS][0].steps) >= LEARNING_STEPS
    if case.learns and is_long and max(reached.values()) - min(reached.values()) > REWARDS_DIFFER:
        found.append(f"{case.name}: the arms do not learn alike: {reached}")
    return found


def beside_ours(runs: Runs) -> Iterator[tuple[str, int, ArmRun, ArmRun]]:
    """Every run with its arm and number, from 1, and the run of ours that has the same seed."""
    for arm, theirs in runs.items():
        for number, (run, our_run) in enumerate(zip(theirs, runs[OURS], strict=True), start=1):
            yield arm, number, run, our_run


def results_of(case: Case, runs: Runs) -> list[Result]:
    """Speed against each baseline; of each arm memory, wall time, and the reward reached."""
    values: dict[tuple[str, str], Callable[[ArmRun], float]] = {
        ("peak memory", "GiB"): lambda run: run.peak_memory / GIB,
        ("wall with start-up", "s"): lambda run: run.seconds,
    }
    if case.learns:
        values["reward reached", ""] = lambda run: run.reward_reached
    return [
        *[speed_result(case, runs, arm) for arm in GOALS],
        *[
            single(CLAIM, [value(run) for run in runs[arm]], unit=unit, case=f"{case.name}: {what}, {arm}")
            for (what, unit), value in values.items()
            for arm in ARMS
        ],
    ]


def speed_result(case: Case, runs: Runs, arm: str) -> Result:
    ours, theirs = ([run.speeds for run in runs[name]] for name in (OURS, arm))
    flat_ours, flat_theirs = ([speed for run in speeds for speed in run] for speeds in (ours, theirs))
    figures = [a / b for a, b in zip(flat_ours, flat_theirs, strict=True)]
    controls = [a / b for a, b in zip(*theirs, strict=True)] if len(theirs) == 2 else []
    notes: dict[str, object] = {
        "case": case.name,
        "differences": differences(case, runs),
        "split": {name: split_of(own) for name, own in runs.items()},
        "curves": {name: [run.curve() for run in own] for name, own in runs.items()} if case.learns else {},
        "steps": {name: [[asdict(s) for s in run.steps] for run in own] for name, own in runs.items()},
    }
    label = f"{case.name}: speed / {arm}"
    return Result(CLAIM, label, "tokens/s", flat_ours, flat_theirs, figures, GOALS[arm], controls, notes)


def split_of(runs: Sequence[ArmRun]) -> dict[str, float]:
    """Median seconds of a counted step and its parts."""
    steps = [step for run in runs for step in run.counted]
    parts = ("generate", "train", "rest", "seconds")
    return {part: float(np.median([getattr(step, part) for step in steps])) for part in parts}


def measure(options: Options) -> list[Result]:
    if find_spec("trl") is None:
        raise UserError("end-to-end: TRL is not installed; pip install trl==1.16.0")
    plain = options.model or str(materialise(ModelSection()))
    endless = str(endless_model(options.model, options.folder / "endless"))
    results: list[Result] = []
    for case in CASES[:1] if options.quick else CASES:
        steps = num_steps(case, options)
        runs: dict[str, list[ArmRun]] = {arm: [] for arm in ARMS}
        for number, order in enumerate([ARMS] if options.quick else [ARMS, ARMS[::-1]]):
            seed = number if case.learns else 0
            for arm in order:
                overrides = overrides_of(case, steps, seed, options, endless if case.is_fixed else plain)
                folder = options.folder / case.name.replace(" ", "-") / f"{arm}-{number}"
                runs[arm].append(run_arm(arm, CONFIG, overrides, folder.resolve()))
                speed = float(np.median(runs[arm][-1].speeds))
                options.say(f"{case.name}, {arm}, run {number + 1}: {speed:.1f} tokens/s")
        check_same_work(case, runs)
        for difference in differences(case, runs):
            options.say(f"not alike: {difference}")
        results += results_of(case, runs)
    return results


def num_steps(case: Case, options: Options) -> int:
    """Of each of an arm's two runs: half of the pairs, and the warm-up."""
    if options.quick:
        return WARMUP + 1
    counted = -(-options.pairs // 2)
    return max(LEARNING_STEPS, WARMUP + counted) if case.learns else WARMUP + counted


def plot(results: Sequence[Result], path: Path) -> None:
    """Where the time of a step goes, and the reward over wall time."""

    speeds = {str(r.notes["case"]): r.notes for r in results if "split" in r.notes}
    with drawn(path, (12, 4.4), widths=(1.4, 1)) as (left, right):
        labels = []
        for group, (case, notes) in enumerate(speeds.items()):
            split = notes["split"]
            assert isinstance(split, dict)
            for place, arm in enumerate(ARMS):
                bottom, x = 0.0, group * (len(ARMS) + 1) + place
                labels.append((x, f"{arm}\n{case}" if place == 1 else arm))
                for part, colour in (("generate", "tab:blue"), ("train", "tab:orange"), ("rest", "0.6")):
                    label = part if not group and not place else None
                    left.bar(x, split[arm][part], bottom=bottom, color=colour, width=0.8, label=label)
                    bottom += split[arm][part]
        left.set_xticks([x for x, _ in labels], [label for _, label in labels])
        left.set(ylabel="seconds a step (median)")
        left.legend()
        for notes in speeds.values():
            curves = notes["curves"]
            assert isinstance(curves, dict)
            for arm, colour in zip(ARMS, ("tab:green", "tab:red", "tab:blue"), strict=True):
                for number, curve in enumerate(curves.get(arm, [])):
                    right.plot(
                        *zip(*curve, strict=True), "-o", ms=3, color=colour, label=None if number else arm
                    )
        right.set(xlabel="seconds since the first step began", ylabel="mean reward of a step's answers")
        right.grid(alpha=0.3)
        right.legend()


def main(argv: Sequence[str] | None = None) -> int:
    return run_claim(CLAIM, __doc__, measure, argv, plot)


if __name__ == "__main__":
    raise SystemExit(main())
