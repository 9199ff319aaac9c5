"""What a synchronous PPO step spends on anything but its stages: 1 - union of the stages' times / wall.

A short real run of the quickstart's online stage (policy, critic, reference, rewards and one vLLM engine,
each in its own actor) on few prompts, in a process of its own; a function stands in for the reward model, so
that nothing has to be trained first. The first step, which warms everything up, is not counted. A small step
is the hard case: what is spent on a step does not grow with its stages.

A stage's time is from the start to the end of the worker's method, by the actor's clock; waiting for a turn
or for arguments is not in it. So what is counted as overhead is the loop, Ray's scheduling and messages,
pickling, copies through the object store, the metrics log, and every moment in which no stage is at work.
What a stage wastes itself is not: `sync` is the whole of publishing, engines included, and `prepare` is
advantages and metrics, but also the Parquet file of all samples. Hence a second row, in which `prepare` is
overhead too. Neither evaluation nor a checkpoint falls into the steps of this run. (In a run with
`eval_every` the engines', scorers' and reference's part of an evaluation counts as theirs, the collecting of
its records as overhead.)

The other rows say which share of a step each role took; roles take turns on shared cores, so that the shares
and the overhead add up to 1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.measure import train_run
from benchmarks.paired import Goal, Options, Result, run_claim, single

CONFIG = "configs/quickstart.yaml"
GOAL = Goal("<=", 0.03)
NO_STAGE = ("time/step", "time/overhead", "time/sync_gather", "time/sync_transfer", "time/sync_load")
"""The last three are parts of `time/sync`."""
WHOLE_RUN = (
    "pipeline=[]",
    "sft=null",
    "preferences=null",
    "reward=null",
    'online.rewards=[{type: function, name: gold, function: "rlhf_ray.rewards.gold:friendliness"}]',
    "online.critic_init=policy",
    "online.prompts_per_step=16",
    "online.max_completion_length=32",
    "online.max_prompt_length=256",  # for the tokenizers of other models
    "online.eval_dataset.limit=4",
    "checkpoint.every=null",
)


def measure(options: Options) -> list[Result]:
    model = [] if options.model is None else [f"model.path={options.model}", "model.chat_template=null"]
    # A folder of its own: a run that is done would only be read.
    output = Path(tempfile.mkdtemp(prefix="overhead-", dir=options.folder)) / "run"
    _, run = train_run(CONFIG, output, [*WHOLE_RUN, f"online.num_steps={1 + options.pairs}", *model])
    steps = [numbers_of(row) for row in run.stage("online").metrics[1:]]
    for step in steps:
        options.say(f"overhead: {step['time/overhead']:.4f} of a step of {step['time/step']:.2f} s")
    return results_of(steps)


def numbers_of(row: Mapping[str, float | str]) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, float)}


def results_of(steps: Sequence[Mapping[str, float]]) -> list[Result]:
    """Rows for the metrics of some steps; shares of a step, the largest role first."""
    overhead = [step["time/overhead"] for step in steps]
    shares = {
        name.removeprefix("time/"): [step.get(name, 0.0) / step["time/step"] for step in steps]
        for name in dict.fromkeys(name for step in steps for name in step)
        if name.startswith("time/") and name not in NO_STAGE
    }
    with_prepare = [own + prepare for own, prepare in zip(overhead, shares["prepare"], strict=True)]
    seconds: dict[str, object] = {"step_seconds": [step["time/step"] for step in steps]}
    return [
        single("overhead", overhead, unit="of a step", goal=GOAL, notes=seconds),
        single("overhead", with_prepare, unit="of a step", case="with prepare"),
        *[
            single("overhead", share, unit="of a step", case=f"({role})")
            for role, share in sorted(shares.items(), key=lambda item: -sum(item[1]))
        ],
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return run_claim("overhead", __doc__, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
