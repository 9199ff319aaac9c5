"""Running the arms of `end-to-end`: what each is given, its process, and what it says of its steps."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.measure import Measured, run_measured
from benchmarks.peers.work import Question, Step, Work, digest, read_steps
from rlhf_ray.config.checks import load_checked
from rlhf_ray.config.schema import ModelSection, OnlineSection, ReasoningGymReward, RunConfig
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.cursor import Cursor
from rlhf_ray.data.encoding import encode_prompts
from rlhf_ray.data.formats import prompt_examples
from rlhf_ray.data.loading import load_rows
from rlhf_ray.engines.number_formats import multiplies_bfloat16
from rlhf_ray.errors import UserError
from rlhf_ray.models.loading import eos_token_ids, load_tokenizer, materialise
from rlhf_ray.reporting.lineage import lineage_path, read_lineage
from rlhf_ray.reporting.metrics_log import read_metrics

OURS = "ours"
PEERS = {"TRL": "benchmarks.peers.trl_grpo", "script": "benchmarks.peers.plain_grpo"}
WARMUP = 1
"""First steps of a run that are not counted."""
NEVER_WRITTEN = "<empty_output>"
"""A token of the embedded model's vocabulary that does not occur in answers."""


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
        """Mean over the last third of the steps: a single one has few answers, each right or wrong."""
        return float(np.mean([step.reward for step in self.steps[-max(1, len(self.steps) // 3) :]]))

    def curve(self) -> list[tuple[float, float]]:
        """Seconds since the first step began, and the reward of the step that ended then."""
        ends = np.cumsum([step.seconds for step in self.steps])
        return [(float(end), step.reward) for end, step in zip(ends, self.steps, strict=True)]


def run_arm(arm: str, config_name: str, overrides: Sequence[str], folder: Path) -> ArmRun:
    """Run an arm in a process of its own; one that is done is only read.

    Raises:
        SystemExit: it failed; names its log.
    """
    record = folder / "arm.json"
    if record.exists():
        found = json.loads(record.read_text())
        return ArmRun(**{**found, "steps": [Step(**step) for step in found["steps"]]})
    shutil.rmtree(folder, ignore_errors=True)
    overrides = [*overrides, f"output_dir={folder / 'output'}"]
    work = work_of(load_checked(config_name, overrides))
    work.write(folder / "work.json")
    steps_file = folder / "steps.json"
    words = ["launch", "train", config_name, *overrides]
    if arm != OURS:
        words = [PEERS[arm], str(folder / "work.json"), str(steps_file)]
    measured = _measured([sys.executable, "-m", *words], work.threads, folder / "log.txt")
    steps = our_steps(work, folder / "output") if arm == OURS else read_steps(steps_file)
    run = ArmRun(measured.seconds, measured.peak_memory, steps)
    record.write_text(json.dumps(asdict(run)))
    return run


def _measured(command: Sequence[str], threads: int, log: Path) -> Measured:
    measured = run_measured(["env", f"OMP_NUM_THREADS={threads}", *command], log)
    if measured.exit_code:
        raise SystemExit(f"{command[2]} failed: see {log}")
    return measured


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
        uses_bfloat16=config.training.uses_bfloat16 and multiplies_bfloat16(),
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
    cursor, size = Cursor(len(prompts), seed), section.prompts_per_step
    return [[questions[row] for row in cursor.next(size)] for _ in range(section.num_steps)]


def our_steps(work: Work, output: Path) -> list[Step]:
    """From the metrics of a run, and from its record of every sample."""
    token_ids = {question.id: question.token_ids for step in work.steps for question in step}
    steps = []
    for number, row in enumerate(read_metrics(output / "metrics.jsonl")):
        samples = read_lineage(lineage_path(output / "rollouts", number))
        prompts = [token_ids.get(sample.prompt_id, []) for sample in samples]
        steps.append(
            Step(
                seconds=float(row["time/step"]),
                generate=float(row["time/generate"]),
                train=float(row.get("time/old_logprobs", 0.0)) + float(row["time/train_policy"]),
                reward=float(row["reward/mean"]),
                prompts=digest(prompts[:: work.num_generations]),
                answers=len(samples),
                prompt_tokens=sum(map(len, prompts)),
                answer_tokens=int(row["perf/generated_tokens"]),
                trained_tokens=sum(sum(sample.is_sampled) for sample in samples if sample.failure is None),
            )
        )
    return steps


def endless_model(model: str | None, folder: Path) -> Path:
    """A copy of the model with an end-of-text that it never writes; its weights are linked."""
    source = Path(materialise(ModelSection(path=model) if model else ModelSection()))
    vocabulary = load_tokenizer(ModelSection(path=str(source))).get_vocab()
    if NEVER_WRITTEN not in vocabulary:
        raise UserError(f"--model={model}: its vocabulary lacks {NEVER_WRITTEN}; use one that has it")
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        target = folder / file.name
        target.unlink(missing_ok=True)
        if file.suffix == ".json":
            shutil.copyfile(file, target)
        else:
            target.symlink_to(file.resolve())
    change_json(folder / "config.json", eos_token_id=vocabulary[NEVER_WRITTEN])
    change_json(folder / "generation_config.json", eos_token_id=vocabulary[NEVER_WRITTEN])
    change_json(folder / "tokenizer_config.json", eos_token=NEVER_WRITTEN)
    return folder


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
