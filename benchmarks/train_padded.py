"""The same policy update against a padded loop, on a batch whose lengths have a long tail.

rlhf-ray bench train-padded

The padded loop takes a fixed number of rows at a time, in the order of the batch, pads prompts on the left
and answers on the right to the longest of the micro-batch (many trainers pad to the longest of the whole
batch, which costs more), and runs the plain model on the rectangle. It takes as many rows as the token budget
of ours has room for when they are the longest: the same memory. What it computes in vain is known from the
lengths, and ours should be faster by nearly that factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

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
    worker_spec,
)
from rlhf_ray.config.schema import TrainingSection
from rlhf_ray.types import RLBatch
from rlhf_ray.workers.policy import PolicyWorker

SHARE = 0.9
"""Of the factor that the token counts promise."""


def fixed_rows(batch: RLBatch, token_budget: int) -> list[NDArray[np.int64]]:
    """Rows of each micro-batch: so many that the longest prompt with the longest answer would fit."""
    widest = int(batch.prompts.lengths.max() + batch.responses.lengths.max())
    num_rows = max(1, token_budget // widest)
    return [np.arange(start, min(start + num_rows, len(batch))) for start in range(0, len(batch), num_rows)]


def padded_tokens(micro_batches: Sequence[RLBatch]) -> int:
    return sum(
        len(rows) * int(rows.prompts.lengths.max() + rows.responses.lengths.max()) for rows in micro_batches
    )


def padded_logprobs(model: nn.Module, rows: RLBatch, device: torch.device) -> torch.Tensor:
    """[R] by the plain model on [b, longest prompt + longest answer], with logits of the answers only."""
    left, right = int(rows.prompts.lengths.max()), int(rows.responses.lengths.max())
    ids = np.zeros((len(rows), left + right), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(rows.prompts, rows.responses, strict=True)):
        ids[row, left - len(prompt) : left], ids[row, left : left + len(answer)] = prompt, answer
        mask[row, left - len(prompt) : left + len(answer)] = 1
    input_ids, attention_mask = (torch.from_numpy(array).to(device) for array in (ids, mask))
    out = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=right + 1)
    logits = out.logits[:, :-1].float()
    targets = input_ids[:, left:]
    logprobs = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return logprobs[attention_mask[:, left:].flatten().bool()]


@dataclass
class Work:
    """A batch, and both updates of it. The micro-batches are those of the padded loop."""

    batch: RLBatch
    micro_batches: list[RLBatch]
    arms: tuple[Update, Update]


def work_of(options: Options, precision: Precision) -> Work:
    model, section = model_of(options), online_section()
    training = TrainingSection(precision=precision, tokens_per_micro_batch=1024 if options.quick else 4096)
    worker = PolicyWorker(model, worker_spec(training, section), section)
    rollouts = rollouts_of(lengths_of(options), len(worker.tokenizer))
    batch = rl_batch(rollouts, worker.logprobs(rollouts))
    micro_batches = [batch.select(rows) for rows in fixed_rows(batch, training.tokens_per_micro_batch)]
    bare = BareDeepSpeed(model, training)
    padded = partial(bare.update, micro_batches, padded_logprobs)
    return Work(batch, micro_batches, (our_update(worker, batch), padded))


def measure(options: Options) -> list[Result]:
    precision = precision_of(options)
    if precision != "float32":
        assert_same_update(work_of(options, "float32").arms)
    work = work_of(options, precision)
    batch, micro_batches = work.batch, work.micro_batches
    ours, baseline = pair_of_arms(*work.arms, num_tokens(batch), precision)
    promised = padded_tokens(micro_batches) / num_tokens(batch)
    return [
        compare(
            "train-padded",
            ours,
            baseline,
            unit="real tokens/s",
            goal=Goal(">=", SHARE * promised),
            pairs=options.pairs,
            warmups=options.warmups,
            say=options.say,
            notes={
                "tokens": num_tokens(batch),
                "padded_tokens": padded_tokens(micro_batches),
                "rows": len(micro_batches[0]),
            },
        )
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return run_claim("train-padded", __doc__, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
