"""Throughput of generation for whoever sizes a deployment: by concurrency, length of the answers, number of
engines and tensor parallelism; ours, bare vLLM, and Hugging Face `generate`.

rlhf-ray bench rollout --sweep --concurrency 8 32 64 --lengths 128 256 --plot sweep.png
rlhf-ray bench rollout --sweep --model Qwen/Qwen2.5-7B-Instruct --engines 1 2 4 --tensor-parallel 1 2

Concurrency is the number of requests that are asked at once, over all engines; the answers of one call are
`--lengths` tokens long on average, with the spread of recorded ones, or each exactly so (`--equal`). Every
system does the same work with the same share of the machine, one system at a time. A batch of Hugging Face's
lasts until its longest answer is done, and only the tokens that were asked for count.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.drawing import drawn
from benchmarks.generation import (
    SYSTEMS,
    Answers,
    Shape,
    Work,
    generate_by_ours,
    our_engines,
    thread_environment,
)
from benchmarks.lengths import ANSWERS, PROMPTS
from benchmarks.measure import write_json
from benchmarks.peer import Peer
from benchmarks.stage import model_folder, open_stage
from launch.cluster import usable_cpus
from launch.memory import model_size
from rlhf_ray.config.schema import EngineSection, ModelSection
from rlhf_ray.engines.number_formats import multiplies_bfloat16
from rlhf_ray.errors import RlhfRayError, UserError

OURS, HUGGING_FACE = "rlhf_ray", "transformers"
NAMES = (OURS, *SYSTEMS)
Generate = Callable[[Work], Answers]


@dataclass(frozen=True)
class Deployment:
    """Fields: tensor_parallel: GPUs of each engine; 1 on CPU."""

    engines: int
    tensor_parallel: int

    def __str__(self) -> str:
        engines = "1 engine" if self.engines == 1 else f"{self.engines} engines"
        return engines if self.tensor_parallel == 1 else f"{engines} of {self.tensor_parallel} GPUs"


@dataclass(frozen=True)
class Point:
    """
    Fields:
        concurrency: requests at once. length: mean tokens of an answer. tokens: of all answers of a call.
        seconds: of each call that counts.
    """

    system: str
    deployment: Deployment
    concurrency: int
    length: float
    tokens: int
    seconds: list[float]

    @property
    def throughput(self) -> float:
        """Tokens a second, by the median call."""
        return self.tokens / float(np.median(self.seconds))


@dataclass(frozen=True)
class Machine:
    cpus: int
    gpus: int

    @classmethod
    def this(cls) -> Machine:
        return cls(usable_cpus(), torch.cuda.device_count())

    def mistakes(self, deployment: Deployment) -> Iterator[str]:
        """Why the deployment does not fit, with a remedy."""
        engines, size = deployment.engines, deployment.tensor_parallel
        if size > 1 and not self.gpus:
            yield f"--tensor-parallel {size}: an engine is spread over GPUs, and there are none here; use 1"
        elif self.gpus and engines * size > self.gpus:
            yield (
                f"--engines {engines} --tensor-parallel {size}: takes {engines * size} GPUs, and there are "
                f"{self.gpus}; lower one of them"
            )
        elif not self.gpus and engines > self.cpus:
            yield f"--engines {engines}: an engine needs a core, and there are {self.cpus}; lower it"

    def threads(self, deployment: Deployment) -> int:
        return 1 if self.gpus else max(1, self.cpus // deployment.engines)

    def devices(self, deployment: Deployment, engine: int) -> dict[str, str]:
        """The environment that shows an engine its own GPUs only."""
        if not self.gpus:
            return {}
        first = engine * deployment.tensor_parallel
        own = range(first, first + deployment.tensor_parallel)
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, own))}


def scaled(lengths: Sequence[int], mean: int, count: int) -> list[int]:
    """`count` lengths with the shape of the given ones and about the mean that is asked for; at least 1."""
    taken = np.resize(np.asarray(lengths), count)
    return [max(1, round(float(length))) for length in taken * (mean / taken.mean())]


def shape_of(concurrency: int, length: int, equal: bool, vocabulary: int) -> Shape:
    """One answer to each prompt: prompts can be dealt out to any number of engines."""
    lengths = [length] * concurrency if equal else scaled(ANSWERS, length, concurrency)
    return Shape(concurrency, 1, PROMPTS, lengths, vocabulary)


@dataclass(frozen=True)
class Sweep:
    """What is asked for. Fields: repeats: calls that count, after one that does not."""

    model: Path
    systems: Sequence[str]
    deployments: Sequence[Deployment]
    shapes: Sequence[tuple[int, Shape]]
    section: EngineSection
    repeats: int
    folder: Path
    say: Callable[[str], None]
    machine: Machine

    @property
    def max_model_len(self) -> int:
        return max(shape.max_model_len for _, shape in self.shapes)

    def run(self) -> list[Point]:
        points = []
        for deployment, system in itertools.product(self.deployments, self.systems):
            if system == HUGGING_FACE and deployment != self.deployments[0]:
                continue  # it has one process and one device, whatever the engines have
            with self.started(system, deployment) as generate:
                for length, shape in self.shapes:
                    point = self.measured(system, deployment, length, shape, generate)
                    self.say(f"{system}, {deployment}: {described(point)}")
                    points.append(point)
        return points

    def measured(
        self, system: str, deployment: Deployment, length: int, shape: Shape, generate: Generate
    ) -> Point:
        seconds = []
        for number in range(1 + self.repeats):
            work = shape.work(number)
            answers = generate(work)
            if [len(tokens) for tokens in answers.tokens] != work.lengths:
                raise RlhfRayError(f"{system}: the answers do not have the lengths that were asked for")
            seconds.append(answers.seconds)
        return Point(system, deployment, shape.num_prompts, length, shape.work(0).num_tokens, seconds[1:])

    @contextmanager
    def started(self, system: str, deployment: Deployment) -> Iterator[Generate]:
        if system == OURS:
            with self.our_engines(deployment) as generate:
                yield generate
            return
        count = 1 if system == HUGGING_FACE else deployment.engines
        section = self.section.model_copy(update={"tensor_parallel_size": deployment.tensor_parallel})
        threads = self.machine.threads(deployment)
        with ExitStack() as stack:
            peers = [
                stack.enter_context(
                    Peer(
                        f"benchmarks.generation:{SYSTEMS[system].__name__}",
                        {
                            "model": str(self.model),
                            "section": section,
                            "max_model_len": self.max_model_len,
                            "threads": threads,
                        },
                        log=self.folder / f"{system}-{index}.log",
                        environment=SYSTEMS[system].environment
                        | thread_environment(threads)
                        | self.machine.devices(deployment, index),
                    )
                )
                for index in range(count)
            ]
            for peer in peers:
                peer.wait_until_built()
            yield lambda work: generate_by_peers(peers, work)

    @contextmanager
    def our_engines(self, deployment: Deployment) -> Iterator[Generate]:
        overrides = [
            f"engine.{name}={value}"
            for name, value in self.section.model_dump(exclude={"backend", "tensor_parallel_size"}).items()
        ]
        overrides += [
            f"engine.tensor_parallel_size={deployment.tensor_parallel}",
            f"placement.engine.count={deployment.engines}",
        ]
        with (
            open_stage(self.model, self.folder / "run", overrides) as context,
            our_engines(context, ModelSection(path=str(self.model)), self.max_model_len) as (group, _),
        ):
            yield lambda work: generate_by_ours(group, work)


def generate_by_peers(peers: Sequence[Peer], work: Work) -> Answers:
    """Each does its share, all at once; the slowest says how long it took."""
    shares = work.shares(len(peers))
    calls = [peer.call("generate", share) for peer, share in zip(peers, shares, strict=False)]
    answers = [call.result() for call in calls]
    return Answers(
        max(answer.seconds for answer in answers), [tokens for a in answers for tokens in a.tokens]
    )


def described(point: Point) -> str:
    return (
        f"{point.concurrency} requests of {point.length:g} tokens on average: {point.throughput:.4g} tokens/s"
    )


def table_of(points: Sequence[Point]) -> Table:
    """A row for each amount of work, a column for each system; and ours against bare vLLM."""
    systems = [name for name in NAMES if any(point.system == name for point in points)]
    found = {(p.deployment, p.length, p.concurrency, p.system): p.throughput for p in points}
    table = Table(title="tokens a second")
    for column in ("engines", "length", "concurrency", *systems, "ours / bare"):
        table.add_column(column, justify="left" if column == "engines" else "right")
    for key in dict.fromkeys(key[:3] for key in found):
        values = [found.get((*key, system)) for system in systems]
        ours, bare = found.get((*key, OURS)), found.get((*key, "vllm"))
        ratio = f"{ours / bare:.2f}" if ours and bare else ""
        cells = ["" if value is None else f"{value:.4g}" for value in values]
        table.add_row(str(key[0]), f"{key[1]:g}", str(key[2]), *cells, ratio)
    return table


def plot(points: Sequence[Point], path: Path) -> None:
    """Throughput against concurrency, a line for each system, deployment and length."""

    with drawn(path, (7.5, 4.5)) as (axis,):
        for (system, deployment, length), line in itertools.groupby(
            points, key=lambda point: (point.system, point.deployment, point.length)
        ):
            own = sorted(line, key=lambda point: point.concurrency)
            axis.plot(
                [point.concurrency for point in own],
                [point.throughput for point in own],
                {OURS: "-o", "vllm": "--s", HUGGING_FACE: ":^"}[system],
                label=f"{system}, {deployment}, {length:g} tokens",
                ms=4,
            )
        axis.set_xscale("log", base=2)
        axis.set(xlabel="requests at once", ylabel="tokens a second", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="rlhf-ray bench rollout --sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--model", help="a folder or a hub name; by default the embedded one")
    found.add_argument("--systems", nargs="+", choices=NAMES, default=list(NAMES))
    found.add_argument("--concurrency", nargs="+", type=positive, default=[1, 4, 16, 64])
    found.add_argument("--lengths", nargs="+", type=positive, default=[128], help="mean tokens of an answer")
    found.add_argument("--equal", action="store_true", help="all answers of a call equally long")
    found.add_argument("--engines", nargs="+", type=positive, default=[1])
    found.add_argument("--tensor-parallel", nargs="+", type=positive, default=[1], help="GPUs of an engine")
    found.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the faster one here")
    found.add_argument("--gpu-memory-utilization", type=float, default=0.85, help="share of each GPU")
    found.add_argument("--cpu-kv-cache-gib", type=float, default=2.0, help="of each engine, without a GPU")
    found.add_argument("--repeats", type=positive, default=3, help="calls of each, after one to warm up")
    found.add_argument("--quick", action="store_true", help="little work: whether it runs, not how fast")
    found.add_argument("--folder", type=Path, help="keep the logs here")
    found.add_argument("--json", type=Path, help="every sample")
    found.add_argument("--plot", type=Path, help="a PNG")
    return found


def sweep_of(args: argparse.Namespace, folder: Path, machine: Machine, say: Callable[[str], None]) -> Sweep:
    """Raises: UserError, ModelError: before anything is started."""
    deployments = [Deployment(*pair) for pair in itertools.product(args.engines, args.tensor_parallel)]
    mistakes = [mistake for deployment in deployments for mistake in machine.mistakes(deployment)]
    if mistakes:
        raise UserError("; ".join(dict.fromkeys(mistakes)))
    if args.quick:
        args.concurrency, args.lengths, args.repeats = [2, 8], [16], 1
    model = model_folder(args.model)
    vocabulary = model_size(ModelSection(path=str(model))).vocabulary
    return Sweep(
        model=model,
        systems=args.systems,
        deployments=deployments,
        shapes=[
            (length, shape_of(concurrency, length, args.equal, vocabulary))
            for length in args.lengths
            for concurrency in sorted(args.concurrency)
        ],
        section=EngineSection(
            dtype=args.dtype or ("bfloat16" if multiplies_bfloat16() else "float32"),
            max_num_seqs=max(args.concurrency),
            gpu_memory_utilization=args.gpu_memory_utilization,
            cpu_kv_cache_gib=args.cpu_kv_cache_gib,
        ),
        repeats=args.repeats,
        folder=folder,
        say=say,
        machine=machine,
    )


def run_sweep(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        sweep = sweep_of(args, folder, Machine.this(), lambda line: console.print(line, highlight=False))
        points = sweep.run()
    write_json(args.json, [{**asdict(point), "throughput": point.throughput} for point in points])
    if args.plot:
        plot(points, args.plot)
    console.print(table_of(points))
    return 0
