"""Schedules over 8 to 1,024 GPUs, simulated; and the simulation against step times that were published.

rlhf-ray bench scale --json scale.json

The simulation is that of `rlhf-ray plan --simulate`: the loop's own class says what is in flight, taken and
given up; engines and trainer take as long as the roofline of an H100 says, for GRPO of a 7B model with 64
answers a GPU and step, of 1,000 tokens in the mean and 8,192 at most. The figure of a schedule is the
shortest step of all schedules over its own. The goal is for what runs where nothing is said: synchronous.
How stale training may be is for its user to say, though, so each `max_lag` that is set by one line, with
half of the devices for the engines, is also held against the best schedule that is no more stale.
Utilisation and staleness of each are in the notes of the JSON and in the lines above the table. First come
the published rows, predicted over published; while not all that are judged are within 15 %, the table of
schedules is a comparison of models, and no claim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.paired import Goal, Options, Result, run_claim, single
from rlhf_ray.config.loading import load_config
from rlhf_ray.planning.hardware import gpu
from rlhf_ray.planning.plan import Assumed, Machine, Plan, make_plan
from rlhf_ray.planning.published import AHEAD, WITHIN, compare_ahead, verdict
from rlhf_ray.planning.schedules import SYNCHRONOUS, Simulated, fleet_of, simulate_all
from rlhf_ray.planning.simulation import Schedule, simulate
from rlhf_ray.planning.timing import Efficiency

SIZES = (8, 32, 128, 512, 1024)
GOAL = Goal(">=", 0.9)
ANSWERS, GROUP = 64, 16
"""A GPU and step, and a prompt."""
LAGS = (1, 2, 4)


def plan_of(num_gpus: int) -> Plan:
    config = load_config(
        {
            "output_dir": "runs/scale",
            "model": {"path": "Qwen/Qwen2.5-7B"},
            "online": {
                "algorithm": "grpo",
                "dataset": {"path": "embedded:prompts"},
                "rewards": [{"type": "length", "max_tokens": 8192}],
                "num_steps": 1,
                "prompts_per_step": num_gpus * ANSWERS // GROUP,
                "num_generations": GROUP,
                "max_completion_length": 8192,
                "max_prompt_length": 1024,
                "track_kl": False,
                "kl_coef": 0.0,
            },
            "training": {"zero_stage": 2, "gradient_checkpointing": True, "tokens_per_micro_batch": 16_384},
            "engine": {"gpu_memory_utilization": 0.8, "max_num_seqs": 256},
            "placement": {
                "mode": "colocated",
                "policy": {"count": num_gpus},
                "engine": {"count": num_gpus},
            },
        }
    )
    return make_plan(config, Machine(gpu("H100"), num_gpus), Assumed(answer=1000, prompt=200))


def published_rows(options: Options) -> list[Result]:
    results = []
    for ahead in AHEAD[:2] if options.quick else AHEAD:
        compared = compare_ahead(ahead, Efficiency())
        ratio = compared.predicted / compared.published
        goal = Goal("<=", 1 + WITHIN) if ratio > 1 else Goal(">=", 1 - WITHIN)
        model = ahead.sync.model.rpartition("/")[2]
        case = (
            f"{ahead.sync.system}, {model}, {ahead.num_devices} GPUs, {ahead.schedule.name} ({compared.use})"
        )
        options.say(f"{case}: predicted {compared.predicted:.1f} s, published {compared.published:.1f} s")
        unit = "predicted / published"
        results.append(
            single(
                "scale",
                [ratio],
                unit=unit,
                goal=None if ahead.unknown else goal,
                case=case,
                notes=asdict(compared.outcome),
            )
        )
    return results


def schedules(options: Options, num_gpus: int) -> list[Result]:
    fleet = fleet_of(plan_of(num_gpus))
    steps = 3 if options.quick else 6
    found = simulate_all(fleet, steps=steps)
    best = min(each.outcome.step for each in found)
    synchronous = found[0].outcome.step
    results = [_result(options, num_gpus, each, best, synchronous) for each in found]
    for lag in LAGS:
        line = Schedule(f"max_lag {lag} and no more said", max_lag=lag, generating=num_gpus // 2)
        own = Simulated(line, simulate(fleet, line, steps))
        as_stale = [each for each in (*found, own) if each.schedule.max_lag <= lag]
        best_as_stale = min(each.outcome.step for each in as_stale)
        results.append(_result(options, num_gpus, own, best_as_stale, synchronous))
    return results


def _result(options: Options, num_gpus: int, each: Simulated, best: float, synchronous: float) -> Result:
    outcome, schedule = each.outcome, each.schedule
    options.say(
        f"{num_gpus} GPUs, {schedule.name}: simulated {outcome.step:.1f} s a step, "
        f"{synchronous / outcome.step:.2f} x the synchronous; devices busy {outcome.busy:.0%}, at full "
        f"batches {outcome.full:.0%}; lag {outcome.lag_mean:.2f} in the mean and {outcome.lag_max} at most; "
        f"{outcome.given_up:.0%} of the prompts given up; what is trained on has {outcome.length:.0%} of the "
        "mean length"
    )
    notes = {**asdict(schedule), **asdict(outcome), "speed_up_simulated": synchronous / outcome.step}
    return single(
        "scale",
        [best / outcome.step],
        unit="best / own, simulated",
        goal=GOAL if schedule.name == SYNCHRONOUS.name else None,
        case=f"{num_gpus} GPUs, {schedule.name}",
        notes=notes,
    )


def measure(options: Options) -> list[Result]:
    results = published_rows(options)
    if not options.quick:
        options.say(str(verdict()))
    for num_gpus in (8,) if options.quick else SIZES:
        results += schedules(options, num_gpus)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    return run_claim("scale", __doc__, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
