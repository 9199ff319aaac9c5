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
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from benchmarks.paired import Goal, Options, Result, run_claim, single
from rlhf_ray.config.schema import EMBEDDED_MODEL, EngineSection, TrainingSection
from rlhf_ray.planning import memory as planned
from rlhf_ray.planning.hardware import GIB, cpu
from rlhf_ray.planning.shapes import shape_of

WITHIN = 0.15
ROW, PROMPT = 256, 32
"""Tokens of a row, and of the prompt in it."""
MICRO_BATCHES = 2
"""Of an update: in the second the gradients of the first are there."""
LARGE_NEEDS = 14 * GIB
DEVICE = cpu(cores=1, memory=0)


@dataclass(frozen=True)
class Case:
    """Fields: model: tiny, small or large. training, engine: what differs from the defaults."""

    model: str
    role: str
    ranks: int = 1
    training: dict[str, object] = field(default_factory=dict)
    engine: dict[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        changed = [f"{key} {value}" for key, value in {**self.training, **self.engine}.items()]
        ranks = [f"{self.ranks} ranks"] if self.ranks > 1 else []
        return ", ".join([f"{self.model} {self.role}", *ranks, *changed])

    @property
    def training_section(self) -> TrainingSection:
        return TrainingSection.model_validate(
            {"tokens_per_micro_batch": 2048, "zero_stage": 0, **self.training}
        )

    @property
    def engine_section(self) -> EngineSection:
        return EngineSection.model_validate({"cpu_kv_cache_gib": 0.25, **self.engine})

    def bytes(self, model: str) -> float:
        """As planned."""
        shape, training = shape_of(model), self.training_section
        if self.role == "engine":
            memory = planned.engine("engine", shape, self.engine_section, longest=2 * ROW, device=DEVICE)
        elif self.role == "reference":
            memory = planned.frozen("reference", [shape], training, longest=ROW, device=DEVICE)
        else:
            role = "critic" if self.role == "critic" else "policy"
            memory = planned.trained(
                role,
                shape,
                training,
                ranks=self.ranks,
                longest=ROW,
                device=DEVICE,  # type: ignore[arg-type]
            )
        return memory.peak


CHECKPOINTS: dict[str, object] = {"gradient_checkpointing": True}
SETTINGS = (
    ("policy", 1, {}),
    ("policy", 1, CHECKPOINTS),
    ("policy", 1, {"tokens_per_micro_batch": 4096, **CHECKPOINTS}),
    ("policy", 1, {"zero_stage": 1}),
    ("policy", 2, {"zero_stage": 2}),
    ("policy", 2, {"zero_stage": 3, **CHECKPOINTS}),
    ("policy", 1, {"lora": {"rank": 16}}),
    ("policy", 1, {"precision": "float32"}),
    ("critic", 1, {}),
    ("reference", 1, {}),
    ("engine", 1, {}),
)
LARGE = (
    ("policy", 1, {}),
    ("policy", 1, {"zero_stage": 1, **CHECKPOINTS}),
    ("critic", 1, {"tokens_per_micro_batch": 1024}),
    ("reference", 1, {}),
    ("engine", 1, {}),
)


def cases(options: Options) -> list[Case]:
    small = [Case("small", role, ranks, dict(training)) for role, ranks, training in SETTINGS]
    if options.quick:
        return [Case("tiny", "policy"), Case("tiny", "reference")]
    tiny = [Case("tiny", role, ranks, dict(t)) for role, ranks, t in SETTINGS if not t]
    large = [Case("large", role, ranks, dict(training)) for role, ranks, training in LARGE]
    if psutil.virtual_memory().available < LARGE_NEEDS:
        options.say(f"left out, for want of {LARGE_NEEDS / GIB:.0f} GiB: the embedded model")
        large = []
    return [*tiny, *small, *large]


def model_folder(name: str, folder: Path) -> str:
    """A random model with the embedded one's tokenizer, or that itself."""
    if name == "large":
        return EMBEDDED_MODEL
    path = folder / name
    if not path.exists():
        words = [sys.executable, "-m", "benchmarks.plan_memory", "--make", name, str(path)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return str(path)


SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "head_dim": 32},
    "small": {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "head_dim": 64},
}


def make_model(name: str, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from rlhf_ray.config.schema import ModelSection
    from rlhf_ray.models.loading import materialise

    source = materialise(ModelSection())
    config = AutoConfig.from_pretrained(source, **SHAPES[name])
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
        expected = case.bytes(model)
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
