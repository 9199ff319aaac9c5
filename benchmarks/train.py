"""Tokens a second of a policy update, against bare DeepSpeed on the same micro-batches.

rlhf-ray bench train

Ours is the trainer rank's own `train_rl`: planning, collating, chunked log-probs, loss, metrics, step. The
baseline knows the micro-batches beforehand, and does forward, loss, backward and step with the same
precision, ZeRO stage and optimizer. Its log-probs come from chunks as ours do, or from all logits at once:
whichever is faster here, which the notes in the JSON say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from benchmarks.paired import Goal, Options, Result, compare, run_claim
from benchmarks.updates import (
    BareDeepSpeed,
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
from rlhf_ray.models.batching import TokenBatch, plan_micro_batches
from rlhf_ray.models.heads import num_head_chunks, token_stats
from rlhf_ray.types import RLBatch
from rlhf_ray.workers.objectives import response_batch
from rlhf_ray.workers.policy import PolicyWorker


class PlainPolicy(nn.Module):
    """Log-probs at the selected positions. chunked: by chunks, else from all their logits at once."""

    def __init__(self, model: PreTrainedModel, token_budget: int) -> None:
        super().__init__()
        self.model = model
        self.num_chunks = num_head_chunks(token_budget)
        self.chunked = False

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        backbone = getattr(self.model, self.model.base_model_prefix)
        hidden = backbone(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1)[batch.select]
        head = self.model.get_output_embeddings()
        if self.chunked:
            return token_stats(head, hidden, batch.targets, 1.0, self.num_chunks).logprobs
        return -F.cross_entropy(head(hidden).float(), batch.targets, reduction="none")


def collated(model: nn.Module, rows: RLBatch, device: torch.device) -> torch.Tensor:
    return model(response_batch(rows, False, device))


def measure(options: Options) -> list[Result]:
    model, section, precision = model_of(options), online_section(), precision_of(options)
    training = TrainingSection(precision=precision, tokens_per_micro_batch=512 if options.quick else 4096)
    worker = PolicyWorker(model, worker_spec(training, section), section)
    rollouts = rollouts_of(lengths_of(options), len(worker.tokenizer))
    batch = rl_batch(rollouts, worker.logprobs(rollouts))
    budget = training.tokens_per_micro_batch
    (plan,) = plan_micro_batches(batch.prompts.lengths + batch.responses.lengths, 1, budget)
    micro_batches = [batch.select(rows) for rows in plan]
    bare = BareDeepSpeed(model, training, lambda network: PlainPolicy(network, budget))
    ours, baseline = pair_of_arms(
        our_update(worker, batch),
        lambda: bare.update(micro_batches, collated),
        num_tokens(batch),
        precision,
    )
    head = _faster_head(bare.engine.module, baseline)
    return [
        compare(
            "train",
            ours,
            baseline,
            unit="tokens/s",
            goal=Goal(">=", 0.95),
            pairs=options.pairs,
            warmups=options.warmups,
            say=options.say,
            notes={"tokens": num_tokens(batch), "micro_batches": len(plan), "baseline_head": head},
        )
    ]


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
