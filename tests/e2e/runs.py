"""Small runs of a tiny model, and how to compare them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file

from rlhf_ray.reporting.metrics_log import MetricsRow, read_metrics
from tests.command_line import CommandLine
from tests.tiny import tiny_model_folder

Tree = dict[str, object]

REWARDS = '''\
"""A person's own reward, beside the configuration."""

import os
import time


def vowels(prompts, completions, **columns):
    time.sleep(float(os.environ.get("REWARD_TAKES", "0")))
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]
'''

EXACT: Tree = {
    "model": {"path": "tiny"},
    "training": {"precision": "float32", "tokens_per_micro_batch": 512, "zero_stage": 0},
    "engine": {"dtype": "float32", "cpu_kv_cache_gib": 0.05},
    "cluster": {"object_store_mib": 300, "call_timeout": 120},
}
"""Everything in float32, so that trainer, reference and engine agree to rounding."""

ONLINE: Tree = {
    **EXACT,
    "online": {
        "dataset": {"path": "prompts.jsonl"},
        "eval_dataset": {"path": "held-out.jsonl"},
        "rewards": [{"type": "function", "name": "vowels", "function": "my_rewards:vowels"}],
        "num_steps": 5,
        "prompts_per_step": 6,
        "num_generations": 2,
        "max_prompt_length": 300,
        "max_completion_length": 12,
        "critic_init": "policy",
        "kl_target": 1.0,
        "normalize_rewards": True,
        "optimizer": {"learning_rate": 1e-3, "lr_scheduler": "linear"},
    },
    "checkpoint": {"every": 2},
    "sync": {"verify_first": 1, "verify_every": 3},
}
"""PPO on a function. All that a checkpoint has to carry is in use, and the steps pass the end of an epoch."""

PREAMBLE = "You are a cook with much patience. " * 6
"""Longer than a block of vLLM's prefix cache: what was cached under earlier weights could be used again."""

PIPELINE: Tree = {
    **EXACT,
    "pipeline": ["sft", "preferences", "reward", "online"],
    "sft": {
        "dataset": {"path": "embedded:demonstrations", "limit": 16},
        "eval_dataset": {"path": "embedded:demonstrations", "split": "test", "limit": 4},
        "batch_size": 8,
        "max_length": 256,
        "max_steps": 2,
    },
    "preferences": {
        "dataset": {"path": "embedded:prompts", "limit": 12},
        "num_generations": 2,
        "pairs_per_prompt": 1,
        "max_completion_length": 12,
        "prompts_per_step": 6,
        "annotators": [
            {"type": "simulated", "name": "careful", "function": "my_rewards:vowels"},
            {
                "type": "simulated",
                "name": "hasty",
                "function": "my_rewards:vowels",
                "temperature": 0.1,
                "error_rate": 0.1,
            },
        ],
    },
    "reward": {"held_out": 0.25, "batch_size": 4, "max_length": 256, "max_steps": 2},
    "online": {
        "dataset": {"path": "embedded:prompts", "limit": 16},
        "eval_dataset": {"path": "embedded:prompts", "split": "test", "limit": 4},
        "rewards": [
            {"type": "model", "name": "proxy"},
            {"type": "function", "name": "gold", "weight": 0, "function": "my_rewards:vowels"},
        ],
        "num_steps": 2,
        "prompts_per_step": 4,
        "num_generations": 2,
        "max_prompt_length": 128,
        "max_completion_length": 12,
        "optimizer": {"learning_rate": 1e-3},
    },
}


def make_workplace(folder: Path) -> Path:
    """A folder as a person has one: a model, a module with a reward, and two configurations."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model_folder(folder / "tiny")
    (folder / "my_rewards.py").write_text(REWARDS)
    for name, count in (("prompts", 16), ("held-out", 4)):
        texts = [f"{PREAMBLE}How long do I boil {number} eggs for the {name}?" for number in range(count)]
        lines = [json.dumps({"prompt": text, "eggs": number}) + "\n" for number, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    for name, tree in (("online", ONLINE), ("pipeline", PIPELINE)):
        write_config(folder / f"{name}.yaml", {"output_dir": f"runs/{name}", **tree})
    return folder


def write_config(path: Path, tree: Tree) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def two_steps(rlhf_ray: CommandLine, name: str, *overrides: str) -> Path:
    """The folder of a run of the online stage that ended well."""
    settings = (f"output_dir=runs/{name}", "online.num_steps=2", *overrides)
    finished = rlhf_ray.run("train", "online.yaml", *settings, timeout=400)
    assert finished.code == 0, finished.err
    return rlhf_ray.folder / "runs" / name


def untimed(run: Path) -> list[MetricsRow]:
    """The metrics of every step, without what depends on the clock, or on when a sync was last verified."""
    timed = ("time", "perf/tokens_per_second", "sync/probe_moved", "sync/probe_followed")
    rows = read_metrics(run / "metrics.jsonl")
    return [
        {name: value for name, value in row.items() if name not in timed and not name.startswith("time/")}
        for row in rows
    ]


def rollouts(run: Path, step: int) -> list[Tree]:
    """The rows of a step's Parquet file."""
    return cast(list[Tree], pq.ParquetFile(run / "rollouts" / f"step-{step:06d}.parquet").read().to_pylist())


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def assert_same_weights(left: Path, right: Path) -> None:
    """Of the models of two runs, bit for bit."""
    ours, theirs = weights(left / "model"), weights(right / "model")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), f"{name} differs by {(tensor - theirs[name]).abs().max()}"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to tell whether anything was touched."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
