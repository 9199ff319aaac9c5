"""Log-probs of given tokens, with the logits in chunks against all logits at once: memory and time.

rlhf-ray bench logprobs

Memory is what a forward, or a forward and backward, through the head adds at its highest point to what was
there before. On a CPU each measurement has a process of its own, whose high-water mark the kernel is asked to
forget before (`/proc/self/clear_refs`); on a GPU the allocator counts. Time is that of the head alone, and of
a whole forward and backward of the model, where recomputing the chunks' logits is a small part.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.paired import Goal, Options, Result, compare, run_claim
from benchmarks.updates import lengths_of, model_of, precision_of, rollouts_of
from rlhf_ray.models.batching import before_responses, collate
from rlhf_ray.models.heads import PolicyModel, num_head_chunks, token_stats
from rlhf_ray.models.loading import load_policy_model

Arm = Literal["ours", "baseline"]
SMALLER, AS_FAST = Goal("<=", 0.25), Goal("<=", 1.05)
MIB = 1 << 20
SAMPLES = 3
LARGE = 4096
"""Tokens: the default budget of a micro-batch."""


@dataclass(frozen=True)
class Head:
    """What is measured: `tokens` hidden states of `hidden` numbers, a head of `vocabulary` rows.

    Fields:
        backward: the gradients of all of them too. threads: of the process that measures.
    """

    tokens: int
    hidden: int
    vocabulary: int
    mixed: bool
    backward: bool
    threads: int


def full_logprobs(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[N] from [N, vocabulary]."""
    return -F.cross_entropy(head(hidden).float(), targets, reduction="none")


def chunked_logprobs(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return token_stats(head, hidden, targets, 1.0, num_head_chunks(len(targets))).logprobs


HEADS: dict[Arm, Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "ours": chunked_logprobs,
    "baseline": full_logprobs,
}


def head_pass(arm: Arm, spec: Head) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
    """A function that runs the pass and returns the log-probs and the hidden states' gradient."""
    device = _device()
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(spec.hidden, spec.vocabulary, bias=False)
    with torch.no_grad():
        head.weight.copy_(0.05 * torch.randn(head.weight.shape, generator=generator))
    head.to(device).requires_grad_(spec.backward)
    hidden = torch.randn(spec.tokens, spec.hidden, generator=generator).to(device)
    targets = torch.randint(spec.vocabulary, (spec.tokens,), generator=generator).to(device)
    weights = torch.randn(spec.tokens, generator=generator).to(device)

    def run() -> tuple[torch.Tensor, torch.Tensor | None]:
        head.zero_grad(set_to_none=True)
        leaf = hidden.detach().requires_grad_(spec.backward)
        with torch.set_grad_enabled(spec.backward), _autocast(spec.mixed):
            logprobs = HEADS[arm](head, leaf, targets)
        if spec.backward:
            (logprobs * weights).sum().backward()
        return logprobs.detach(), leaf.grad

    return run


def added_memory(arm: Arm, spec: Head) -> list[float]:
    """MiB that each of some passes adds at its highest point."""
    if torch.cuda.is_available():
        return _added_memory(arm, spec)
    # Freed tensors go back to the system at once, instead of into a pool that grows unseen.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_added_memory, arm, spec).result()


def _added_memory(arm: Arm, spec: Head) -> list[float]:
    torch.set_num_threads(spec.threads)
    # What is set up at the first use of a kernel is no part of it.
    head_pass(arm, Head(64, 64, 64, spec.mixed, spec.backward, spec.threads))()
    run = head_pass(arm, spec)
    return [_peak_of(run) / MIB for _ in range(SAMPLES)]


def _peak_of(run: Callable[[], object]) -> int:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def seconds_of(run: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        _synchronise()
        began = time.perf_counter()
        run()
        _synchronise()
        return time.perf_counter() - began

    return timed


def assert_alike(
    ours: Sequence[torch.Tensor | None], full: Sequence[torch.Tensor | None], mixed: bool
) -> None:
    for one, other in zip(ours, full, strict=True):
        if one is not None and other is not None:
            distance = float((one - other).norm() / other.norm())
            assert distance < (1e-2 if mixed else 1e-5), f"they differ by {distance}"


def measure(options: Options) -> list[Result]:
    results = []
    for backward in (False, True):
        spec = head_of(options, backward)
        case = "forward and backward" if backward else "forward"
        runs = {arm: head_pass(arm, spec) for arm in HEADS}
        assert_alike(runs["ours"](), runs["baseline"](), spec.mixed)
        results.append(_memory(options, spec, f"memory, {case}"))
        results.append(_time(options, runs, f"time of the head, {case}"))
    results.append(_time(options, model_passes(options), "time of the model, forward and backward"))
    return results


def head_of(options: Options, backward: bool) -> Head:
    """In the size of the model's own head."""
    config = load_policy_model(model_of(options)).config
    mixed = precision_of(options) == "mixed"
    tokens = 1024 if options.quick else LARGE
    return Head(tokens, config.hidden_size, config.vocab_size, mixed, backward, torch.get_num_threads())


def model_passes(options: Options) -> dict[Arm, Callable[[], object]]:
    """A forward and backward of the model on a micro-batch, with the log-prob of every token but the
    first."""
    device = _device()
    model = load_policy_model(model_of(options))
    torch.nn.Module.to(model, device)  # transformers' own `to` is typed without devices
    mixed = precision_of(options) == "mixed"
    rows = rollouts_of(lengths_of(options)[:16], model.config.vocab_size).sequences
    batch = collate(rows, before_responses(np.ones(len(rows), dtype=np.int64), rows), "padded", device)
    policy = PolicyModel(model)

    def run(full: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        model.zero_grad(set_to_none=True)
        with _autocast(mixed):
            if full:
                hidden = model.get_submodule(model.base_model_prefix)(batch.input_ids, use_cache=False)[0]
                chosen = hidden.flatten(0, 1)[batch.select]
                logprobs = full_logprobs(model.get_output_embeddings(), chosen, batch.targets)
            else:
                logprobs = policy(batch).logprobs
        logprobs.mean().backward()
        embedding = model.get_input_embeddings().get_parameter("weight")
        return logprobs.detach(), embedding.grad

    assert_alike(run(full=False), run(full=True), mixed)
    return {"ours": lambda: run(full=False), "baseline": lambda: run(full=True)}


def _memory(options: Options, spec: Head, case: str) -> Result:
    """No control, and no turns: what other processes do does not change it."""
    ours, baseline = added_memory("ours", spec), added_memory("baseline", spec)
    options.say(f"logprobs {case}: ours {ours} MiB, baseline {baseline} MiB")
    figures = [one / other for one, other in zip(ours, baseline, strict=True)]
    notes: dict[str, object] = {"tokens": spec.tokens, "vocabulary": spec.vocabulary, "hidden": spec.hidden}
    return Result("logprobs", case, "MiB", ours, baseline, figures, SMALLER, notes=notes)


def _time(options: Options, runs: Mapping[Arm, Callable[[], object]], case: str) -> Result:
    return compare(
        "logprobs",
        seconds_of(runs["ours"]),
        seconds_of(runs["baseline"]),
        unit="s",
        case=case,
        goal=AS_FAST,
        pairs=options.pairs,
        warmups=options.warmups,
        say=options.say,
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _autocast(mixed: bool) -> Iterator[None]:
    with torch.autocast(_device().type, dtype=torch.bfloat16, enabled=mixed):
        yield


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> int:
    return run_claim("logprobs", __doc__, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
