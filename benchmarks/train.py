"""Tokens a second of a policy update, against bare DeepSpeed on the same micro-batches.

rlhf-ray bench train

Ours is the trainer rank's own `train_rl`: planning, collating, chunked log-probs, loss, metrics, step. The
baseline knows the micro-batches beforehand, and does forward, loss, backward and step with the same
precision, ZeRO stage and optimizer. Its log-probs come from chunks as ours do, or from all logits at once:
whichever is faster here, which the notes in the JSON say.

Where a prompt has several answers, `training.share_prompts` computes it once for all of them. Its cases are
measured against our own update without it, in the shape of configs/grpo-arithmetic.yaml, 16 prompts of 70
tokens with 8 answers of 4 to 12 each, and in that of the recorded lengths. The goal is most of what the
counts of computed tokens promise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from benchmarks.paired import Goal, Options, Result, compare, run_claim
from benchmarks.updates import (
    BareDeepSpeed,
    Precision,
    Update,
    assert_same_update,
    lengths_of,
    model_of,
    num_tokens,
    online_section,
    our_update,
    pair_of_arms,
    precision_of,
    rl_batch,
    rollouts_of,
    without_bfloat16_half,
    worker_spec,
)
from rlhf_ray.config.schema import Layout, TrainingSection
from rlhf_ray.models.batching import TokenBatch, before_responses, collate
from rlhf_ray.models.heads import num_head_chunks, token_stats
from rlhf_ray.models.planning import plan_micro_batches
from rlhf_ray.types import RLBatch, Rollouts
from rlhf_ray.workers.objectives import response_batch
from rlhf_ray.workers.policy import PolicyWorker


class PlainPolicy(nn.Module):
    """Log-probs at the selected positions. chunked: by chunks, else from all their logits at once."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.chunked = False

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        backbone = getattr(self.model, self.model.base_model_prefix)
        hidden = backbone(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1)[batch.select]
        head = self.model.get_output_embeddings()
        if self.chunked:
            num_chunks = num_head_chunks(len(batch.targets))
            return token_stats(head, hidden, batch.targets, 1.0, num_chunks).logprobs
        return -F.cross_entropy(head(hidden).float(), batch.targets, reduction="none")


def collated(model: nn.Module, rows: RLBatch, device: torch.device) -> torch.Tensor:
    return model(response_batch(rows, "padded", device))


SHORT_ANSWERS = tuple((70, 4 + row % 9) for row in range(128))
GROUP = 8
SHARE = 0.8
"""Of the factor that the token counts promise to shared prompts: the optimizer's step does not shrink."""


def measure(options: Options) -> list[Result]:
    if precision_of(options) != "float32":
        assert_same_updates(options, worker_of(options, "float32"))
    worker = worker_of(options, precision_of(options))
    return [against_deepspeed(options, worker), *shared_prompts(options, worker)]


def assert_same_updates(options: Options, worker: PolicyWorker) -> None:
    """Of all that is compared; where the runs that are timed are in float32, they show it themselves."""
    assert_same_update(work_of(options, worker).arms)
    for _, _, batch in groups_of(options, worker):
        assert_same_update(sharing_arms(worker, our_update(worker, batch)))


def worker_of(options: Options, precision: Precision) -> PolicyWorker:
    section = online_section()
    training = TrainingSection(precision=precision, tokens_per_micro_batch=512 if options.quick else 4096)
    return PolicyWorker(model_of(options), worker_spec(training, section), section)


@dataclass
class Work:
    """A batch, the micro-batches that both arms cut it into, the plain loop, and both updates."""

    batch: RLBatch
    micro_batches: list[RLBatch]
    bare: BareDeepSpeed
    arms: tuple[Update, Update]


def work_of(options: Options, worker: PolicyWorker) -> Work:
    training = worker.spec.training
    rollouts = rollouts_of(lengths_of(options), len(worker.tokenizer))
    batch = rl_batch(rollouts, worker.logprobs(rollouts))
    budget = training.tokens_per_micro_batch
    (plan,) = plan_micro_batches(batch.prompts.lengths + batch.responses.lengths, 1, budget)
    micro_batches = [batch.select(rows) for rows in plan]
    bare = BareDeepSpeed(model_of(options), training, PlainPolicy)
    plain = partial(bare.update, micro_batches, collated)
    return Work(batch, micro_batches, bare, (our_update(worker, batch), plain))


def against_deepspeed(options: Options, worker: PolicyWorker) -> Result:
    work = work_of(options, worker)
    ours, baseline = pair_of_arms(*work.arms, num_tokens(work.batch), precision_of(options))
    head = _faster_head(work.bare.engine.module, baseline)
    return compare(
        "train",
        ours,
        baseline,
        unit="tokens/s",
        goal=Goal(">=", 0.95),
        pairs=options.pairs,
        warmups=options.warmups,
        say=options.say,
        notes={
            "tokens": num_tokens(work.batch),
            "micro_batches": len(work.micro_batches),
            "baseline_head": head,
        },
    )


def groups_of(options: Options, worker: PolicyWorker) -> Iterator[tuple[str, Rollouts, RLBatch]]:
    """Several answers to each prompt: the name of their lengths, and the batch."""
    shapes = {"short answers": SHORT_ANSWERS[:16] if options.quick else without_bfloat16_half(SHORT_ANSWERS)}
    if not options.quick:
        shapes["recorded lengths"] = lengths_of(options)
    for name, lengths in shapes.items():
        rollouts = rollouts_of(lengths, len(worker.tokenizer), GROUP)
        yield name, rollouts, rl_batch(rollouts, worker.logprobs(rollouts))


def sharing_arms(worker: PolicyWorker, work: Update) -> tuple[Update, Update]:
    """The same work by the same worker, whose weights do not move: with sharing, and without."""

    def arm(share_prompts: bool) -> Update:
        own = worker.spec.training.model_copy(update={"share_prompts": share_prompts})
        spec = replace(worker.spec, training=own)

        def run() -> tuple[float, float]:
            worker.spec = spec
            return work()

        return run

    return arm(True), arm(False)


def shared_prompts(options: Options, worker: PolicyWorker) -> list[Result]:
    """The update and the log-probs that go before it, with and without sharing."""
    results = []
    for name, rollouts, batch in groups_of(options, worker):
        works = {"update": our_update(worker, batch), "log-probs": _logprobs(worker, rollouts)}
        results += [
            _shared(options, worker, rollouts, f"{name}, {what}", work) for what, work in works.items()
        ]
    return results


def _shared(options: Options, worker: PolicyWorker, rollouts: Rollouts, case: str, work: Update) -> Result:
    precision, tokens = precision_of(options), num_tokens(rollouts)
    ours, baseline = pair_of_arms(*sharing_arms(worker, work), tokens, precision)
    budget = worker.spec.training.tokens_per_micro_batch
    shared, alone = (computed_tokens(rollouts, layout, budget) for layout in ("shared", "padded"))
    return compare(
        "train",
        ours,
        baseline,
        unit="tokens/s",
        goal=Goal(">=", SHARE * alone / shared),
        case=f"shared prompts, {case}",
        pairs=options.pairs,
        warmups=options.warmups,
        say=options.say,
        notes={"tokens": tokens, "computed": shared, "computed_without": alone},
    )


def computed_tokens(rollouts: Rollouts, layout: Layout, token_budget: int) -> int:
    """Positions of all rectangles that a pass over the rollouts runs through the model."""
    sequences, prompts = rollouts.sequences, rollouts.prompts
    shared = prompts if layout == "shared" else None
    (plan,) = plan_micro_batches(sequences.lengths, 1, token_budget, shared)
    total = 0
    for rows in plan:
        own, starts = sequences.select(rows), prompts.select(rows)
        is_source = before_responses(starts.lengths, own)
        total += collate(own, is_source, layout, torch.device("cpu"), starts).input_ids.numel()
    return total


def _logprobs(worker: PolicyWorker, rollouts: Rollouts) -> Update:
    """Their mean, which may be off as a loss may, and their size."""

    def run() -> tuple[float, float]:
        values = worker.logprobs(rollouts).values
        return float(values.mean()), float(np.linalg.norm(values))

    return run


def _faster_head(module: PlainPolicy, run: object) -> str:
    """Leaves the module with the head that was faster in the better of two runs after a first one."""
    assert callable(run)
    speeds = {}
    for chunked in (False, True):
        module.chunked = chunked
        run()
        speeds[chunked] = max(run(), run())
    module.chunked = speeds[True] > speeds[False]
    return "chunked" if module.chunked else "all logits at once"


def main(argv: Sequence[str] | None = None) -> int:
    return run_claim("train", __doc__, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
