"""Log-prob and entropy from logits, in few passes over them and with little memory beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd.function import FunctionCtx, once_differentiable


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


def _read(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> _Found:
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
    stats = TokenStats(of_target - log_normalizer, entropy, of_target >= largest)
    return _Found(stats, log_normalizer)


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
        logprobs = logits.to(torch.float32, copy=True).div_(temperature).sub_(log_normalizer[:, None])
        one = torch.zeros_like(entropy) if of_logprobs is None else of_logprobs / temperature
        if of_entropy is None:
            gradient = logprobs.exp_().mul_(-one[:, None])
        else:
            other = (of_entropy / temperature)[:, None]
            probabilities = logprobs.exp()
            gradient = (
                logprobs.add_(entropy[:, None]).mul_(other).add_(one[:, None]).mul_(probabilities).neg_()
            )
        gradient.scatter_add_(-1, targets[:, None], one[:, None])
        return gradient.to(logits.dtype), None, None, None
