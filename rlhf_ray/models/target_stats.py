"""Log-prob and entropy from logits, in few passes over them and with little memory beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

BLOCK_LOGITS = 1 << 20
"""As many are read at a time on a CPU, where each pass over them then finds them in the cache."""


@dataclass(frozen=True)
class TokenStats:
    """[N] each: log-prob of the target, entropy of the distribution (both temperature-scaled), and whether
    nothing is likelier than the target."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    is_top: torch.Tensor


@dataclass(frozen=True)
class _Found:
    stats: TokenStats
    log_normalizer: torch.Tensor


Memory = list[_Found]
"""What the first forward of a chunk found, for when the chunk is computed again for the gradient: that needs
the logits anew, and none of what was read from them."""


def target_stats(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, memory: Memory
) -> TokenStats:
    """
    Args:
        logits: [N, V] as the head gives them; targets: [N].
        temperature: divides the logits, in float32.
        memory: a list of the chunk's own, empty before its first forward.
    """
    logprobs, entropy, is_top = _TargetStats.apply(logits, targets, temperature, memory)
    return TokenStats(logprobs, entropy, is_top)


def _blocks(logits: torch.Tensor) -> Iterator[slice]:
    """Rows of [N, V] to read together; on a GPU all, since every pass over them is a launch."""
    rows, width = logits.shape
    at_a_time = max(1, BLOCK_LOGITS // width) if logits.device.type == "cpu" else max(1, rows)
    return (slice(start, start + at_a_time) for start in range(0, max(1, rows), at_a_time))


def _read(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> _Found:
    parts = [_read_block(logits[rows], targets[rows], temperature) for rows in _blocks(logits)]
    logprobs, entropy, is_top, log_normalizer = (torch.cat(column) for column in zip(*parts, strict=True))
    return _Found(TokenStats(logprobs, entropy, is_top), log_normalizer)


def _read_block(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, entropy, whether the target is the top, and the log of the normaliser."""
    scaled = logits.float()
    if temperature != 1:
        scaled = scaled / temperature
    of_target = scaled.gather(-1, targets[:, None]).squeeze(-1)
    largest = scaled.amax(-1)
    exponentials = (scaled - largest[:, None]).exp_()
    total = exponentials.sum(-1)
    log_normalizer = largest + total.log()
    # H = log Z - E[logit]
    entropy = log_normalizer - exponentials.mul_(scaled).sum(-1) / total
    return of_target - log_normalizer, entropy, of_target >= largest, log_normalizer


class _TargetStats(torch.autograd.Function):
    """With z the scaled logits and p their softmax: d log p(target) / dz = [target] - p, and
    dH / dz = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: torch.Tensor, targets: torch.Tensor, temperature: float, memory: Memory
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not memory:
            memory.append(_read(logits, targets, temperature))
        stats, log_normalizer = memory[0].stats, memory[0].log_normalizer
        ctx.save_for_backward(logits, targets, log_normalizer, stats.entropy)
        ctx.temperature = temperature  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        # Aliases: what a function returns is given a history, and the memory must stay without.
        logprobs, entropy, is_top = (
            each.view_as(each) for each in (stats.logprobs, stats.entropy, stats.is_top)
        )
        ctx.mark_non_differentiable(is_top)
        return logprobs, entropy, is_top

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, of_logprobs: torch.Tensor | None, of_entropy: torch.Tensor | None, _: None
    ) -> tuple[torch.Tensor | None, None, None, None]:
        logits, targets, log_normalizer, entropy = ctx.saved_tensors  # type: ignore[attr-defined]
        if of_logprobs is None and of_entropy is None:
            return None, None, None, None
        temperature: float = ctx.temperature  # type: ignore[attr-defined]
        one = torch.zeros_like(entropy) if of_logprobs is None else of_logprobs / temperature
        other = None if of_entropy is None else of_entropy / temperature
        gradient = torch.empty_like(logits)
        for rows in _blocks(logits):
            logprobs = logits[rows].to(torch.float32, copy=True).div_(temperature)
            logprobs.sub_(log_normalizer[rows, None])
            if other is None:
                block = logprobs.exp_().mul_(-one[rows, None])
            else:
                probabilities = logprobs.exp()
                block = logprobs.add_(entropy[rows, None]).mul_(other[rows, None]).add_(one[rows, None])
                block.mul_(probabilities).neg_()
            gradient[rows] = block.scatter_add_(-1, targets[rows, None], one[rows, None])
        return gradient, None, None, None
