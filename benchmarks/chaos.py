"""Kills the processes of small runs at random moments, and counts what was lost.

Runs of PPO with a critic on a model of a few million random weights, each as a person starts it. While a run
goes on, one of its processes gets SIGKILL now and then: an engine, the reward, the reference, the experience
actor, the policy or the critic; in the scenario `nodes`, all processes of a node at once, and another node
comes in its place. Most kills wait until the run has ended more steps than it had at the last one, and then
for a phase of a step that is drawn; the others fall into what that one caused. Afterwards every sample that
was trained on is looked at.

* `synchronous`: two engines; all that the run leaves must equal that of a run that nobody disturbed, bit for
  bit: metrics, samples, final weights.
* `streamed`: a vLLM engine that works ahead and never drains; no prompt may be lost or trained on twice, and
  no token may be of weights older than `max_lag` allows.
* `nodes`: as `synchronous`, on a cluster of a head and two nodes.
* `colocated`: as `synchronous`, with all roles on the same cores in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.assault import Assault, Kill
from benchmarks.measure import write_json
from benchmarks.stage import model_folder
from benchmarks.victims import Nodes, nodes
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.reporting.files import read_lines
from rlhf_ray.reporting.lineage import SampleLineage, lineage_path, read_lineage
from rlhf_ray.reporting.metrics_log import MetricsRow, read_metrics

STEPS, PROMPTS, GENERATIONS, MAX_LAG = 24, 6, 2, 1
TIMED = ("time", "recovery/", "perf/tokens_per_second", "sync/probe_moved", "sync/probe_followed")

CONFIG: dict[str, object] = {
    "training": {"precision": "float32", "tokens_per_micro_batch": 1024, "zero_stage": 1},
    "engine": {"dtype": "float32", "cpu_kv_cache_gib": 0.05},
    "checkpoint": {"every": 4},
    "sync": {"verify_first": 1, "verify_every": 4},
    "cluster": {"object_store_mib": 200, "call_timeout": 120, "max_restarts": 8},
    "online": {
        "dataset": {"path": "embedded:prompts", "limit": 40},
        "rewards": [{"type": "function", "name": "vowels", "function": "benchmarks.chaos:vowels"}],
        "num_steps": STEPS,
        "prompts_per_step": PROMPTS,
        "num_generations": GENERATIONS,
        "max_prompt_length": 256,
        "max_completion_length": 24,
        "critic_init": "policy",
        "normalize_rewards": True,
        "optimizer": {"learning_rate": 1e-4},
    },
}
ROLES = ("policy", "critic", "reference", "reward", "engine")
# One thread each, wherever they are: sums of floats depend on how they are split.
EXACT = ["engine.backend=transformers", "placement.engine.count=2"]
EXACT += [f"placement.{role}.threads=1" for role in ROLES]
SCENARIOS = {
    "synchronous": EXACT,
    "streamed": [f"online.max_lag={MAX_LAG}"],
    # More than one node has.
    "nodes": [*EXACT, *(f"placement.{role}.cpus=0.6" for role in ROLES)],
    "colocated": [*EXACT, "placement.mode=colocated"],
}


def vowels(prompts: Sequence[object], completions: Sequence[str], **columns: object) -> list[float]:
    """Share of the letters."""
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


def small_model(folder: Path) -> Path:
    """Random weights behind the embedded model's tokenizer."""
    source = model_folder(None)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    original = AutoConfig.from_pretrained(source)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=original.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        bos_token_id=original.bos_token_id,
        eos_token_id=original.eos_token_id,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass
class Disturbed:
    """A run, and what was done to it.

    Fields:
        missing: samples that should have been trained on and were not. doubled: those trained on twice.
        differences: from the undisturbed run, in words; of a synchronous run there must be none.
        returns: (what, seconds until it worked again).
    """

    scenario: str
    seed: int
    exit_code: int = -1
    seconds: float = 0.0
    kills: list[Kill] = field(default_factory=list)
    missing: int = 0
    doubled: int = 0
    stale: int = 0
    differences: list[str] = field(default_factory=list)
    returns: list[tuple[str, float]] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return not (self.exit_code or self.missing or self.doubled or self.stale or self.differences)


class Runs:
    """Args: folder: of the model, the configuration and the runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = small_model(folder / "model")
        self.config = folder / "chaos.yaml"
        # JSON is YAML.
        self.config.write_text(json.dumps({"model": {"path": str(model)}, "output_dir": "runs", **CONFIG}))

    def start(self, run: Path, scenario: str, cluster: Nodes | None) -> subprocess.Popen[bytes]:
        words = [str(self.config), f"output_dir={run}", *SCENARIOS[scenario]]
        if cluster is not None:
            words += [f"cluster.address={cluster.address}"]
        with run.with_suffix(".log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "launch", "train", *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )

    def calm(self, scenario: str) -> Path:
        """The run that nobody disturbs; where nothing is ahead, it is `synchronous`."""
        run = self.folder / ("streamed-calm" if scenario == "streamed" else "synchronous-calm")
        if (
            not (run / "model").exists()
            and self.start(run, "streamed" if scenario == "streamed" else "synchronous", None).wait()
        ):
            raise RlhfRayError(f"the undisturbed run failed; see {run.with_suffix('.log')}")
        return run

    def disturbed(self, scenario: str, seed: int, most: int) -> Disturbed:
        """Args: most: kills."""
        calm = self.calm(scenario)
        found = Disturbed(scenario, seed)
        run = self.folder / f"{scenario}-{seed}"
        with ExitStack() as stack:
            cluster = stack.enter_context(nodes(2)) if scenario == "nodes" else None
            began = time.monotonic()
            process = self.start(run, scenario, cluster)
            chance = random.Random(f"{scenario} {seed}")
            try:
                Assault(run, process, chance, STEPS, most, cluster, found.kills).go_on()
            except TimeoutError as stands_still:
                found.differences.append(str(stands_still))
                process.kill()
            found.exit_code = process.wait()
            found.seconds = round(time.monotonic() - began, 1)
        audit(run, calm, found)
        return found


def audit(run: Path, calm: Path, found: Disturbed) -> None:
    """What the run trained on, and what it left, beside what it should have."""
    if (run / "recoveries.jsonl").exists():
        for line in read_lines(run / "recoveries.jsonl"):
            if line["event"] == "returned":
                found.returns.append((str(line["name"]), float(str(line["seconds"]))))
    lag = MAX_LAG if found.scenario == "streamed" else 0
    expected: Counter[tuple[int, int]] = Counter()
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(STEPS):
        expected.update((row.prompt_id, row.sample_id) for row in samples(calm, step))
        rows = samples(run, step)
        seen.update((row.prompt_id, row.sample_id) for row in rows)
        found.stale += sum(not step - lag <= r.version_min <= r.version_max <= step for r in rows)
    found.missing = (expected - seen).total()
    found.doubled = (seen - expected).total()
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
    if steps != list(range(STEPS)):
        found.differences.append(f"metrics of steps {steps}")
    if found.scenario != "streamed" and not found.exit_code:
        found.differences += differences(run, calm)


def samples(run: Path, step: int) -> list[SampleLineage]:
    return list(read_lineage(path)) if (path := lineage_path(run / "rollouts", step)).exists() else []


def untimed(run: Path) -> list[MetricsRow]:
    rows = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in rows]


def differences(run: Path, calm: Path) -> list[str]:
    """In metrics, samples and final weights."""
    both = zip(untimed(run), untimed(calm), strict=False)
    found = [
        f"metrics of step {ours['step']}"
        for ours, theirs in both
        if repr(sorted(ours.items())) != repr(sorted(theirs.items()))
    ]
    found += [f"samples of step {s}" for s in range(STEPS) if repr(samples(run, s)) != repr(samples(calm, s))]
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, calm))
    return found + [name for name in theirs if not torch.equal(ours[name], theirs[name])]


def summary(runs: Sequence[Disturbed]) -> dict[str, object]:
    """Of all runs of a scenario."""
    in_place = [seconds for run in runs for name, seconds in run.returns if name != "all roles"]
    rebuilt = [seconds for run in runs for name, seconds in run.returns if name == "all roles"]
    kills = [kill for run in runs for kill in run.kills]
    return {
        "runs": len(runs),
        "kills": len(kills),
        "whom": counts(kill.whom.split("-")[0] for kill in kills),
        "phases": counts(kill.phase for kill in kills),
        "steps": sorted(kill.step for kill in kills),
        "survived": sum(len(run.kills) for run in runs if run.is_whole),
        "samples": len(runs) * STEPS * PROMPTS * GENERATIONS,
        "lost": sum(run.missing for run in runs),
        "doubled": sum(run.doubled for run in runs),
        "stale": sum(run.stale for run in runs),
        "different": sum(bool(run.differences) for run in runs),
        "replaced": len(in_place),
        "replaced_median_s": float(np.median(in_place)) if in_place else None,
        "replaced_max_s": max(in_place, default=None),
        "rebuilt": len(rebuilt),
        "rebuilt_median_s": float(np.median(rebuilt)) if rebuilt else None,
        "rebuilt_max_s": max(rebuilt, default=None),
    }


def counts(words: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(words).items()))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="rlhf-ray bench chaos", description=about)
    parser.add_argument("--kills", type=int, default=30, help="of each scenario")
    parser.add_argument("--kills-per-run", type=int, default=5, help="at most")
    parser.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--seed", type=int, default=0, help="of the first run; later ones count on")
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    console = Console()
    everything: list[Disturbed] = []
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        runs = Runs(folder.resolve())
        for scenario in args.scenarios:
            own: list[Disturbed] = []
            left, seed = args.kills, args.seed
            while left > 0:
                found = runs.disturbed(scenario, seed, min(left, args.kills_per_run))
                own.append(found)
                left, seed = left - max(1, len(found.kills)), seed + 1
                said = "whole" if found.is_whole else f"NOT WHOLE: {asdict(found)}"
                kills = ", ".join(map(str, found.kills))
                console.print(f"{scenario} {found.seed}: {kills}; {found.seconds} s; {said}", highlight=False)
                # A later run may fail.
                results[scenario] = summary(own)
                every = [asdict(run) for run in [*everything, *own]]
                write_json(args.json, {"scenarios": results, "runs": every})
            everything += own
    console.print_json(json.dumps(results))
    return 0 if all(run.is_whole for run in everything) else 1


if __name__ == "__main__":
    raise SystemExit(main())
