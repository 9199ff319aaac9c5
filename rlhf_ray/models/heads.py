"""The models that are trained: a policy (log-probs of tokens) and a scalar model (a number for each).

Both are `nn.Module`s whose forward does everything: ZeRO-3 gathers parameters only in a module's forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf_ray.models.batching import TokenBatch

CHUNK_TOKENS = 512
"""Tokens whose logits exist at the same time: 512 x 50k float32 logits are 100 MB."""


@dataclass(frozen=True)
class TokenStats:
    """[N] each: log-prob of the target, entropy of the distribution (both temperature-scaled), argmax hit."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    is_top: torch.Tensor


def token_stats(
    head: nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    num_chunks: int,
    entropy_has_grad: bool = False,
) -> TokenStats:
    """Apply the language-model head chunk by chunk, so that [N, vocabulary] never exists.

    The logits of a chunk are recomputed in the backward pass instead of kept. A frozen head wants reentrant
    checkpoints: the others keep the parameter itself, which ZeRO-3 has emptied again before its use.

    Args:
        hidden: [N, H] last hidden states; targets: [N].
        temperature: divides the logits, in float32.
        num_chunks: the same on every rank, since each chunk is one gather of the head under ZeRO-3.
        entropy_has_grad: whether the entropy is differentiated, which keeps two more arrays of logits.
    """

    def chunk_stats(
        hidden: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = head(hidden).float() / temperature
        log_normalizer = torch.logsumexp(logits, dim=-1)
        logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_normalizer
        with torch.no_grad():
            is_top = logits.argmax(-1) == targets if len(targets) else targets.bool()
        with torch.set_grad_enabled(entropy_has_grad and torch.is_grad_enabled()):
            # H = log Z - E[logit]
            entropy = log_normalizer - (torch.exp(logits - log_normalizer[:, None]) * logits).sum(-1)
        return logprobs, entropy, is_top

    chunks = zip(hidden.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True)
    if torch.is_grad_enabled():
        reentrant = not any(parameter.requires_grad for parameter in head.parameters())
        parts = [checkpoint(chunk_stats, h, t, use_reentrant=reentrant) for h, t in chunks]
    else:
        parts = [chunk_stats(h, t) for h, t in chunks]
    logprobs, entropy, is_top = (torch.cat(column) for column in zip(*parts, strict=True))
    return TokenStats(logprobs, entropy if entropy_has_grad else entropy.detach(), is_top)


def num_head_chunks(token_budget: int) -> int:
    return -(-token_budget // CHUNK_TOKENS)


class PolicyModel(nn.Module):
    """A causal language model that answers with log-probs of given tokens instead of logits."""

    def __init__(self, model: PreTrainedModel, token_budget: int) -> None:
        super().__init__()
        self.model = model
        self.num_chunks = num_head_chunks(token_budget)

    def forward(
        self, batch: TokenBatch, temperature: float = 1.0, entropy_has_grad: bool = False
    ) -> TokenStats:
        return token_stats(
            self.model.get_output_embeddings(),
            _hidden(self.model, batch),
            batch.targets,
            temperature,
            self.num_chunks,
            entropy_has_grad,
        )


class ScalarModel(nn.Module):
    """A sequence-classification model of one label: [N] `score` of the hidden state at each position.

    Positions come from lengths. The library's own pooling looks for the last token that is not the pad token,
    and with pad == EOS it skips the final EOS.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        head = self.model.get_submodule("score")
        return head(_hidden(self.model, batch)).squeeze(-1).float()


def _hidden(model: PreTrainedModel, batch: TokenBatch) -> torch.Tensor:
    """[N, H] last hidden states at the selected positions."""
    backbone = getattr(model, model.base_model_prefix)
    packed = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    hidden = backbone(
        input_ids=batch.input_ids, attention_mask=None, use_cache=False, **packed
    ).last_hidden_state
    return hidden.flatten(0, 1)[batch.select]
