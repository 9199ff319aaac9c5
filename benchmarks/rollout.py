"""Tokens a second of the generation actor, its results in the driver, against bare `vllm.LLM.generate`.

rlhf-ray bench rollout
rlhf-ray bench rollout --sweep --help      for whoever sizes a deployment

The same engine arguments, threads, prompts, seeds and lengths of answers in both; the arms take turns, and
every call of theirs must return the same tokens. Bare vLLM is timed around `generate` alone; ours from the
call in the driver until log-probs, versions and all other columns are there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

from actors.group import ActorGroup
from benchmarks.generation import (
    Answers,
    BareVLLM,
    Shape,
    Work,
    generate_by_ours,
    our_engines,
    thread_environment,
)
from benchmarks.lengths import ANSWERS, PROMPTS
from benchmarks.paired import Goal, Options, Result, compare, run_claim, single
from benchmarks.peer import Peer
from benchmarks.stage import model_folder, open_stage
from launch.memory import model_size
from rlhf_ray.config.schema import ModelSection
from rlhf_ray.engines.number_formats import multiplies_bfloat16
from rlhf_ray.errors import RlhfRayError

CLAIM = "rollout"
GOAL = Goal(">=", 0.97)
SHARE_OF_GPU = 0.4
"""Of its memory, an engine: both stay."""


class Arm:
    """One way to do the work; its calls are numbered, and so are the tokens that they ask for.

    Args:
        answered: by number of the call, what the other arm said; shared by both.
    """

    def __init__(
        self, shape: Shape, generate: Callable[[Work], Answers], answered: dict[int, list[list[int]]]
    ) -> None:
        self._shape = shape
        self._generate = generate
        self._answered = answered
        self._num_calls = 0
        self.seconds: list[float] = []

    def __call__(self) -> float:
        """Tokens a second of the next call.

        Raises:
            RlhfRayError: the answers are not those of the other arm, or not as long as they were to be.
        """
        number = self._num_calls
        self._num_calls += 1
        work = self._shape.work(number)
        answers = self._generate(work)
        check_answers(work, answers, self._answered.setdefault(number, answers.tokens))
        self.seconds.append(answers.seconds)
        return work.num_tokens / answers.seconds


def check_answers(work: Work, answers: Answers, others: list[list[int]]) -> None:
    """Raises: RlhfRayError."""
    lengths = [len(tokens) for tokens in answers.tokens]
    if lengths != work.lengths:
        raise RlhfRayError(f"the answers have {lengths} tokens, and should have {work.lengths}")
    different = [
        row for row, pair in enumerate(zip(answers.tokens, others, strict=True)) if pair[0] != pair[1]
    ]
    if different:
        raise RlhfRayError(
            f"the two arms answer {len(different)} of {len(others)} requests differently, the first is "
            f"request {different[0]}: {answers.tokens[different[0]]} and {others[different[0]]}"
        )


def shape_of(options: Options, vocabulary: int) -> Shape:
    """On a CPU without bfloat16 answers have a quarter of their lengths: a call takes half a minute."""
    if options.quick:
        return Shape(2, 4, PROMPTS[:2], [max(1, length // 16) for length in ANSWERS[:8]], vocabulary)
    if not multiplies_bfloat16():
        return Shape(16, 4, PROMPTS, [length // 4 for length in ANSWERS], vocabulary)
    return Shape(64 if torch.cuda.is_available() else 16, 4, PROMPTS, ANSWERS, vocabulary)


def measure(options: Options) -> list[Result]:
    folder = model_folder(options.model)
    model = ModelSection(path=str(folder))
    shape = shape_of(options, model_size(model).vocabulary)
    num_sequences = shape.num_prompts * shape.num_generations
    overrides = [
        f"engine.max_num_seqs={num_sequences}",
        f"engine.gpu_memory_utilization={SHARE_OF_GPU}",
        # All answers fit in at once: no engine has to put one off and compute it again.
        "engine.cpu_kv_cache_gib=1.0",
    ]
    with (
        open_stage(folder, options.folder / "run", overrides) as context,
        our_engines(context, model, shape.max_model_len) as (engines, threads),
        Peer(
            "benchmarks.generation:BareVLLM",
            {
                "model": str(folder),
                "section": context.config.engine,
                "max_model_len": shape.max_model_len,
                "threads": threads,
            },
            log=options.folder / "bare-vllm.log",
            environment=BareVLLM.environment | thread_environment(threads),
        ) as bare,
    ):
        bare.wait_until_built()
        return compared(options, shape, engines, bare, {"model": options.model, "threads": threads})


def compared(
    options: Options, shape: Shape, engines: ActorGroup, bare: Peer, notes: dict[str, object]
) -> list[Result]:
    answered: dict[int, list[list[int]]] = {}
    in_actor: list[float] = []

    def by_ours(work: Work) -> Answers:
        answers = generate_by_ours(engines, work)
        in_actor.append(engines.timeline.take()["time/generate"])
        return answers

    ours = Arm(shape, by_ours, answered)
    theirs = Arm(shape, lambda work: bare.call("generate", work).result(), answered)
    result = compare(
        CLAIM,
        ours,
        theirs,
        unit="tokens/s",
        goal=GOAL,
        pairs=options.pairs,
        warmups=options.warmups,
        say=options.say,
        notes=notes
        | {
            "requests": shape.num_prompts * shape.num_generations,
            "tokens": shape.work(0).num_tokens,
            "lengths": shape.work(0).lengths,
        },
    )
    outside = [1000 * (whole - inside) for whole, inside in zip(ours.seconds, in_actor, strict=True)]
    delivery = single(CLAIM, outside[options.warmups :], unit="ms", case="delivery")
    return [result, delivery]


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if "--sweep" in words:
        from benchmarks.rollout_sweep import run_sweep

        return run_sweep([word for word in words if word != "--sweep"])
    return run_claim(CLAIM, __doc__, measure, words)


if __name__ == "__main__":
    raise SystemExit(main())
