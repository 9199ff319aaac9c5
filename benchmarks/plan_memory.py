"""Memory of the real workers of each role, each in a process of its own, against what `rlhf-ray plan` says.

rlhf-ray bench plan-memory --json plan-memory.json
rlhf-ray bench plan-memory --quick

A worker is built, does its work on two full micro-batches twice, and the kernel says how much memory its
process had at most (the largest of its ranks, where there are several). Models: two random layers; some 50M
random parameters; and the embedded 135M, left out with --quick and where less than 14 GiB are available. The
figure is measured over planned; the goal is to be within 15 %.
"""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import psutil

from benchmarks.paired import Goal, Options, Result, run_claim, single
from rlhf_ray.config.schema import EMBEDDED_MODEL
from rlhf_ray.planning.hardware import GIB
from rlhf_ray.planning.measured import MEASURED, MODELS, ROW, WITHIN, Case

PROMPT = 32
"""Tokens of a row's prompt."""
MICRO_BATCHES = 2
"""Of an update: in the second the gradients of the first are there."""
LARGE_NEEDS = 14 * GIB


def cases(options: Options) -> list[Case]:
    """Those that were measured before."""
    known = [case for case, _ in MEASURED]
    if options.quick:
        return [case for case in known if case.model == "tiny" and case.role in ("policy", "reference")]
    if psutil.virtual_memory().available < LARGE_NEEDS:
        options.say(f"left out, for want of {LARGE_NEEDS / GIB:.0f} GiB: the embedded model")
        known = [case for case in known if case.model != "large"]
    return known


def model_folder(name: str, folder: Path) -> str:
    """A random model with the embedded one's tokenizer, or that itself."""
    if name == "large":
        return EMBEDDED_MODEL
    path = folder / name
    if not path.exists():
        words = [sys.executable, "-m", "benchmarks.plan_memory", "--make", name, str(path)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return str(path)


def make_model(name: str, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from rlhf_ray.config.schema import ModelSection
    from rlhf_ray.models.loading import materialise

    source, shape = materialise(ModelSection()), MODELS[name]
    config = AutoConfig.from_pretrained(
        source,
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def measured_bytes(case: Case, model: str) -> tuple[float, float]:
    """Peak of the largest rank, and what its process took before it had a model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.plan_memory", "--work"),
                json.dumps({"case": asdict(case), "model": model, "rank": rank, "port": port}),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(case.ranks)
    ]
    outputs = [process.communicate(timeout=600) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{case.name}: {errors[-2000:]}")
    found = [json.loads(output.strip().splitlines()[-1]) for output, _ in outputs]
    largest = max(found, key=lambda each: float(each["peak"]))
    return float(largest["peak"]), float(largest["before"])


def peak() -> int:
    """Bytes that this process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(case: Case, model: str, rank: int, port: int) -> None:
    """In a process of its own: be the worker."""
    import torch

    torch.set_num_threads(1)
    before = _engine(case, model) if case.role == "engine" else _worker(case, model, rank, port)
    print(json.dumps({"peak": peak(), "before": before}), flush=True)


def _engine(case: Case, model: str) -> int:
    import numpy as np

    import actors.host  # noqa: F401
    from benchmarks.stage import model_folder as materialised
    from rlhf_ray.engines.vllm_generator import VLLMGenerator
    from rlhf_ray.types import Ragged

    before = peak()
    engine = VLLMGenerator(
        str(materialised(model)), case.engine_section, 2 * ROW, threads=1, seed=0, version=0
    )
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, 40_000, ROW).tolist() for _ in range(16)]
    engine.token_logprobs(Ragged.from_rows(rows, np.int32))
    return before


def _worker(case: Case, model: str, rank: int, port: int) -> int:
    # What an actor has imported before it has a model.
    import deepspeed  # noqa: F401
    import torch

    import actors.host  # noqa: F401
    from benchmarks.updates import online_section, rl_batch, rollouts_of
    from rlhf_ray.config.schema import ModelSection
    from rlhf_ray.engines.deepspeed_engine import World
    from rlhf_ray.workers.frozen import ReferenceWorker
    from rlhf_ray.workers.model_worker import WorkerSpec
    from rlhf_ray.workers.policy import PolicyWorker
    from rlhf_ray.workers.scalar import CriticWorker

    before, training, section = peak(), case.training_section, ModelSection(path=model)
    rows = MICRO_BATCHES * case.ranks * training.tokens_per_micro_batch // ROW
    rollouts = rollouts_of([(PROMPT, ROW - PROMPT)] * rows, 40_000)
    if case.role == "reference":
        reference = ReferenceWorker(section, training, torch.device("cpu"), threads=1)
        reference.logprobs(rollouts, 1.0)
        return before
    online = online_section()
    world = World(rank, case.ranks, f"127.0.0.1:{port}", 1, use_gpu=False)
    spec = WorkerSpec(online.optimizer, training, world, total_steps=2, seed=0)
    if case.role == "critic":
        critic = CriticWorker(section, spec, online)
        batch = rl_batch(rollouts, critic.values(rollouts))
        for step in range(2):
            critic.train_rl(batch, step)
        return before
    policy = PolicyWorker(section, spec, online)
    batch = rl_batch(rollouts, policy.logprobs(rollouts))
    for step in range(2):
        policy.train_rl(batch, step, kl_coef=0.0)
    return before


def measure(options: Options) -> list[Result]:
    results = []
    for case in cases(options):
        model = model_folder(case.model, options.folder)
        expected = case.planned
        found, before = measured_bytes(case, model)
        options.say(
            f"{case.name}: measured {found / GIB:.2f} GiB, planned {expected / GIB:.2f} GiB "
            f"({found / expected - 1:+.0%}); before the model {before / GIB:.2f} GiB"
        )
        notes: dict[str, object] = {"measured": found, "planned": expected, "before": before}
        ratio = found / expected
        results.append(
            single(
                "plan-memory",
                [ratio],
                unit="measured / planned",
                goal=Goal("<=", 1 + WITHIN) if ratio > 1 else Goal(">=", 1 - WITHIN),
                case=case.name,
                notes=notes,
            )
        )
    return results


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--make"]:
        make_model(words[1], Path(words[2]))
        return 0
    if words[:1] == ["--work"]:
        given = json.loads(words[1])
        work(Case(**given["case"]), given["model"], given["rank"], given["port"])
        return 0
    return run_claim("plan-memory", __doc__, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
