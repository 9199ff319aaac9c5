"""The same GRPO work by this project, by TRL's GRPOTrainer and by a plain script without Ray, on this machine.

rlhf-ray bench end-to-end --json end-to-end.json --plot docs/studies/end-to-end.png --folder runs/end-to-end

The task is that of configs/grpo-arithmetic.yaml: sums, an embedded model of 135M parameters, 16 questions and 8
answers a step, two optimizer steps. Every arm gets the same questions in the same order, the same model,
reward, loss, learning rate, threads and budget of tokens a pass. Three cases:

- `12 tokens`: every answer has 12 tokens. The arms learn for some steps; what they reach is compared too.
- `64 tokens`: every answer has 64.
- `to 64 tokens`: answers end where they end, 64 at the latest, so lengths differ, as they do in practice.

Lengths are fixed by a model whose end-of-text is a token that it never writes; nothing else about it differs,
and no arm needs an option for it.

Each arm runs as a process of its own, in turn: script, TRL, ours, ours, TRL, script, so that each pair of
arms stands in the order A B B A. The first three share one seed, the last three another. Start-up is not
counted, nor is the first step of each run. Step i of a run of ours is paired with step i of the other's run of
the same seed; the control is step i of the baseline's first run by that of its second. Compared are real
tokens a second, of questions and answers, of whole steps: generation, reward, training, new weights in the
engine. Where lengths are fixed the arms must have done exactly as many tokens, else 5 % more or less: answers
are drawn by lot.

What the arms are is in benchmarks/peers/. Ours is `rlhf-ray train` as a user runs it, with its verification
of the engine's weights and its record of every sample; only evaluation between steps is off.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks.measure import GIB, Measured, run_measured
from benchmarks.paired import Goal, Options, Result, run_claim, single
from benchmarks.peers.work import Question, Step, Work, digest, read_steps
from rlhf_ray.config.checks import load_checked
from rlhf_ray.config.schema import ModelSection, OnlineSection, ReasoningGymReward, RunConfig
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.cursor import Cursor
from rlhf_ray.data.encoding import encode_prompts
from rlhf_ray.data.formats import prompt_examples
from rlhf_ray.data.loading import load_rows
from rlhf_ray.errors import UserError
from rlhf_ray.models.loading import eos_token_ids, load_tokenizer, materialise
from rlhf_ray.reporting.lineage import lineage_path, read_lineage
from rlhf_ray.reporting.metrics_log import read_metrics

CLAIM = "end-to-end"
CONFIG = "configs/grpo-arithmetic.yaml"
NEVER_WRITTEN = "<empty_output>"
"""A token of the embedded model's vocabulary that does not occur in answers."""
ARMS = ("script", "TRL", "ours")
GOALS = {"TRL": Goal(">=", 3.0), "script": Goal(">=", 0.95)}
WARMUP = 1
"""First steps of a run that are not counted."""
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
    Case("64 tokens", 64, True),
    Case("to 64 tokens", 64, False),
)
LEARNING_STEPS = 12


@dataclass(frozen=True)
class ArmRun:
    """Fields: seconds: with start-up. peak_memory: bytes of all its processes."""

    seconds: float
    peak_memory: int
    steps: list[Step]

    @property
    def counted(self) -> list[Step]:
        return self.steps[WARMUP:]

    @property
    def speeds(self) -> list[float]:
        """Tokens a second of each counted step."""
        return [step.tokens / step.seconds for step in self.counted]

    @property
    def reward_reached(self) -> float:
        """Mean over the last third of the steps: answers are few and right or wrong."""
        return float(np.mean([step.reward for step in self.steps[-max(1, len(self.steps) // 3) :]]))

    def curve(self) -> list[tuple[float, float]]:
        """Seconds since the first step began, and the reward of the step that ended then."""
        ends = np.cumsum([step.seconds for step in self.steps])
        return [(float(end), step.reward) for end, step in zip(ends, self.steps, strict=True)]


Runs = Mapping[str, Sequence[ArmRun]]
"""Arm -> its runs, one a seed."""


# the work


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


def work_of(config: RunConfig) -> Work:
    """What our run of this configuration will do, for the peers."""
    section = config.online
    assert section is not None
    (reward,) = section.rewards
    assert isinstance(reward, ReasoningGymReward)
    tokenizer = load_tokenizer(config.model)
    ends = eos_token_ids(config.model, tokenizer)
    return Work(
        model=str(materialise(config.model)),
        template=str(tokenizer.chat_template),
        eos_ids=list(ends),
        seed=config.seed,
        steps=_questions(section, config.seed, ChatFormatter(tokenizer, ends)),
        num_generations=section.num_generations,
        max_prompt_length=section.max_prompt_length,
        max_completion_length=section.max_completion_length,
        temperature=section.temperature,
        learning_rate=section.optimizer.learning_rate,
        max_grad_norm=section.optimizer.max_grad_norm,
        cliprange=section.recipe.cliprange,
        importance_cap=section.importance_cap,
        num_mini_batches=section.num_mini_batches,
        tokens_per_micro_batch=config.training.tokens_per_micro_batch,
        kv_cache_gib=config.engine.cpu_kv_cache_gib,
        max_num_seqs=config.engine.max_num_seqs,
        threads=len(os.sched_getaffinity(0)),
        extract=reward.extract,
    )


def _questions(section: OnlineSection, seed: int, formatter: ChatFormatter) -> list[list[Question]]:
    """Of every step, in the order in which our loop draws them."""
    examples, _ = prompt_examples(load_rows(section.dataset, seed))
    prompts, _ = encode_prompts(examples, formatter, section.max_prompt_length)
    questions = [
        Question(
            id=int(prompts.ids[row]),
            messages=list(prompts.messages[row]),
            token_ids=prompts.token_ids[row].tolist(),
            entry=dict(prompts.columns[row]["entry"]),  # type: ignore[call-overload]
            task_options=dict(prompts.columns[row]["task_options"]),  # type: ignore[call-overload]
        )
        for row in range(len(prompts))
    ]
    cursor = Cursor(len(prompts), seed)
    return [
        [questions[row] for row in cursor.next(section.prompts_per_step)] for _ in range(section.num_steps)
    ]


def endless_model(model: str | None, folder: Path) -> Path:
    """The model with an end-of-text that it never writes; its weights are linked, not copied."""
    source = Path(materialise(ModelSection(path=model) if model else ModelSection()))
    tokenizer = load_tokenizer(ModelSection(path=str(source)))
    end = tokenizer.convert_tokens_to_ids(NEVER_WRITTEN)
    if not isinstance(end, int) or NEVER_WRITTEN not in tokenizer.get_vocab():
        raise UserError(f"--model={model}: its vocabulary lacks {NEVER_WRITTEN}; use one that has it")
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        target = folder / file.name
        target.unlink(missing_ok=True)
        if file.suffix == ".json":
            shutil.copyfile(file, target)
        else:
            target.symlink_to(file.resolve())
    for name in ("config.json", "generation_config.json"):
        record = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(record | {"eos_token_id": end}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": NEVER_WRITTEN}))
    return folder


# the arms


def run_arm(arm: str, overrides: Sequence[str], folder: Path) -> ArmRun:
    """Run an arm in a process of its own; one that is done is only read.

    Raises:
        SystemExit: it failed; names its log.
    """
    record = folder / "run.json"
    if record.exists():
        found = json.loads(record.read_text())
        return ArmRun(**{**found, "steps": [Step(**step) for step in found["steps"]]})
    shutil.rmtree(folder, ignore_errors=True)
    config = load_checked(CONFIG, [*overrides, f"output_dir={folder / 'output'}"])
    work = work_of(config)
    work.write(folder / "work.json")
    measured, steps = (_run_ours if arm == "ours" else _run_peer)(arm, work, overrides, folder)
    run = ArmRun(measured.seconds, measured.peak_memory, steps)
    record.write_text(json.dumps(asdict(run)))
    return run


def _run_peer(arm: str, work: Work, overrides: Sequence[str], folder: Path) -> tuple[Measured, list[Step]]:
    module = {"TRL": "benchmarks.peers.trl_grpo", "script": "benchmarks.peers.plain_grpo"}[arm]
    steps = folder / "steps.json"
    command = [sys.executable, "-m", module, str(folder / "work.json"), str(steps)]
    return _measured(command, work.threads, folder), read_steps(steps)


def _run_ours(arm: str, work: Work, overrides: Sequence[str], folder: Path) -> tuple[Measured, list[Step]]:
    output = folder / "output"
    command = [sys.executable, "-m", "launch", "train", CONFIG, *overrides, f"output_dir={output}"]
    measured = _measured(command, work.threads, folder)
    return measured, our_steps(work, output)


def _measured(command: Sequence[str], threads: int, folder: Path) -> Measured:
    log = folder / "log.txt"
    measured = run_measured(["env", f"OMP_NUM_THREADS={threads}", *command], log)
    if measured.exit_code:
        raise SystemExit(f"{command[2]} failed: see {log}")
    return measured


def our_steps(work: Work, output: Path) -> list[Step]:
    """From the metrics of a run, and from its record of every sample."""
    token_ids = {question.id: question.token_ids for step in work.steps for question in step}
    steps = []
    for number, row in enumerate(read_metrics(output / "metrics.jsonl")):
        samples = read_lineage(lineage_path(output / "rollouts", number))
        prompts = [token_ids[sample.prompt_id] for sample in samples]
        steps.append(
            Step(
                seconds=float(row["time/step"]),
                generate=float(row["time/generate"]),
                train=float(row["time/old_logprobs"]) + float(row["time/train_policy"]),
                reward=float(row["reward/mean"]),
                prompts=digest(prompts[:: work.num_generations]),
                prompt_tokens=sum(map(len, prompts)),
                answer_tokens=int(row["perf/generated_tokens"]),
                trained_tokens=sum(sum(s.is_sampled) for s in samples if s.failure is None),
            )
        )
    return steps


# what is made of them


def check_same_work(case: Case, runs: Runs, samples: int) -> None:
    """
    Raises:
        SystemExit: an arm did other work than ours; says what.
    """
    mistakes = []
    for arm, theirs in runs.items():
        for number, (run, our_run) in enumerate(zip(theirs, runs["ours"], strict=True)):
            name = f"{case.name}, {arm}, run {number + 1}"
            if [step.prompts for step in run.steps] != [step.prompts for step in our_run.steps]:
                mistakes.append(f"{name}: other questions, or another order")
            for index, step in enumerate(run.steps):
                if step.trained_tokens != step.answer_tokens:
                    sampled, trained = step.answer_tokens, step.trained_tokens
                    mistakes.append(f"{name}, step {index}: {sampled} tokens sampled, {trained} trained on")
                if case.is_fixed and step.answer_tokens != samples * case.tokens:
                    mistakes.append(f"{name}, step {index}: {step.answer_tokens} tokens in {samples} answers")
            tokens, ours = (sum(step.tokens for step in r.steps) for r in (run, our_run))
            if abs(tokens / ours - 1) > LENGTHS_DIFFER:
                mistakes.append(f"{name}: {tokens} tokens where ours did {ours}")
    if case.learns and len(runs["ours"][0].steps) >= LEARNING_STEPS:
        reached = {
            arm: float(np.mean([run.reward_reached for run in theirs])) for arm, theirs in runs.items()
        }
        if max(reached.values()) - min(reached.values()) > REWARDS_DIFFER:
            mistakes.append(f"{case.name}: the arms do not learn alike: {reached}")
    if mistakes:
        raise SystemExit("the arms did not do the same work:\n  " + "\n  ".join(mistakes))


def results_of(case: Case, runs: Runs) -> list[Result]:
    """Speed against each baseline, memory, wall time, and the reward reached."""
    results = [speed_result(case, runs, arm) for arm in ("TRL", "script")]
    for arm in ("TRL", "script"):
        results.append(_beside(case, f"peak memory / {arm}", "GiB", runs, arm, lambda r: r.peak_memory / GIB))
        results.append(_beside(case, f"wall with start-up / {arm}", "s", runs, arm, lambda r: r.seconds))
        if case.learns:
            results.append(
                _beside(case, f"reward reached / {arm}", "", runs, arm, lambda r: r.reward_reached)
            )
    return results


def speed_result(case: Case, runs: Runs, arm: str) -> Result:
    ours, theirs = ([run.speeds for run in runs[name]] for name in ("ours", arm))
    flat_ours, flat_theirs = ([speed for run in speeds for speed in run] for speeds in (ours, theirs))
    figures = [a / b for a, b in zip(flat_ours, flat_theirs, strict=True)]
    controls = [a / b for a, b in zip(*theirs, strict=True)] if len(theirs) == 2 else []
    notes: dict[str, object] = {
        "case": case.name,
        "split": {name: split_of(own) for name, own in runs.items()},
        "curves": {name: [run.curve() for run in own] for name, own in runs.items()} if case.learns else {},
        "steps": {name: [[asdict(s) for s in run.steps] for run in own] for name, own in runs.items()},
    }
    label = f"{case.name} / {arm}"
    return Result(CLAIM, label, "tokens/s", flat_ours, flat_theirs, figures, GOALS[arm], controls, notes)


def split_of(runs: Sequence[ArmRun]) -> dict[str, float]:
    """Median seconds of a counted step and its parts."""
    steps = [step for run in runs for step in run.counted]
    parts = ("generate", "train", "rest", "seconds")
    return {part: float(np.median([getattr(step, part) for step in steps])) for part in parts}


def _beside(case: Case, what: str, unit: str, runs: Runs, arm: str, value) -> Result:  # type: ignore[no-untyped-def]
    """A row of ours beside the baseline's, without a goal."""
    ours, theirs = ([float(value(run)) for run in runs[name]] for name in ("ours", arm))
    # A model of a quick run may get nothing right.
    figures = [a / b if b else float("nan") for a, b in zip(ours, theirs, strict=True)]
    return Result(CLAIM, f"{case.name}, {what}", unit, ours, theirs, figures)


def measure(options: Options) -> list[Result]:
    if find_spec("trl") is None:
        raise UserError("end-to-end: TRL is not installed; pip install trl==1.16.0")
    plain = options.model or str(materialise(ModelSection()))
    endless = str(endless_model(options.model, options.folder / "endless"))
    results: list[Result] = []
    for case in CASES[:1] if options.quick else CASES:
        steps = num_steps(case, options)
        runs: dict[str, list[ArmRun]] = {arm: [] for arm in ARMS}
        for seed, order in enumerate([ARMS] if options.quick else [ARMS, ARMS[::-1]]):
            for arm in order:
                overrides = overrides_of(case, steps, seed, options, endless if case.is_fixed else plain)
                folder = options.folder / case.name.replace(" ", "-") / f"{arm}-{seed}"
                runs[arm].append(run_arm(arm, overrides, folder.resolve()))
                speed = float(np.median(runs[arm][-1].speeds))
                options.say(f"{case.name}, {arm}, seed {seed}: {speed:.1f} tokens/s")
        check_same_work(case, runs, samples=4 if options.quick else 128)
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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    speeds = {str(r.notes["case"]): r.notes for r in results if "split" in r.notes}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.4), width_ratios=[1.4, 1])
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
                right.plot(*zip(*curve, strict=True), "-o", ms=3, color=colour, label=None if number else arm)
    right.set(xlabel="seconds since the first step began", ylabel="mean reward of a step's answers")
    right.grid(alpha=0.3)
    right.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    return run_claim(CLAIM, __doc__, measure, argv, plot)


if __name__ == "__main__":
    raise SystemExit(main())
