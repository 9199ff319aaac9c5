"""The models that are trained: a policy (log-probs of tokens) and a scalar model (a number for each).

Both are `nn.Module`s whose forward does everything: ZeRO-3 gathers parameters only in a module's forward.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf_ray.models.batching import TokenBatch
from rlhf_ray.models.sizes import CHUNK_TOKENS
from rlhf_ray.models.target_stats import Memory, TokenStats, target_stats

BY_ROWS = "sdpa_by_rows"
"""The name of `row_attention` among the library's kinds of attention."""


class SequenceGroup(Protocol):
    """Ranks that share the tokens of every sequence."""

    def part(self, batch: TokenBatch) -> TokenBatch:
        """What this rank computes of it."""
        ...

    def join(self, values: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """[N, …] of all selected positions of the batch, from those [n, …] of this rank's part."""
        ...


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
        entropy_has_grad: whether the entropy is differentiated.
    """

    def chunk_stats(
        hidden: torch.Tensor, targets: torch.Tensor, memory: Memory
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        stats = target_stats(head(hidden), targets, temperature, memory)
        entropy = stats.entropy if entropy_has_grad else stats.entropy.detach()
        return stats.logprobs, entropy, stats.is_top

    chunks = zip(hidden.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True)
    if torch.is_grad_enabled():
        reentrant = not any(parameter.requires_grad for parameter in head.parameters())
        parts = [checkpoint(chunk_stats, h, t, [], use_reentrant=reentrant) for h, t in chunks]
    else:
        parts = [chunk_stats(h, t, []) for h, t in chunks]
    logprobs, entropy, is_top = (torch.cat(column) for column in zip(*parts, strict=True))
    return TokenStats(logprobs, entropy if entropy_has_grad else entropy.detach(), is_top)


def num_head_chunks(num_tokens: int) -> int:
    return max(1, -(-num_tokens // CHUNK_TOKENS))


class PolicyModel(nn.Module):
    """A causal language model that answers with log-probs of given tokens instead of logits.

    Args:
        token_budget: the most tokens of a forward, where every rank must apply the head equally often, as
            ZeRO-3 wants it; None: as often as the tokens at hand need, since every chunk casts the head anew.
    """

    def __init__(self, model: PreTrainedModel, token_budget: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.token_budget = token_budget
        self.sequence_group: SequenceGroup | None = None

    def forward(
        self, batch: TokenBatch, temperature: float = 1.0, entropy_has_grad: bool = False
    ) -> TokenStats:
        group = self.sequence_group
        own = group.part(batch) if group else batch
        stats = token_stats(
            self.model.get_output_embeddings(),
            hidden_states(self.model, own),
            own.targets,
            temperature,
            num_head_chunks(self.token_budget or len(own.targets)),
            entropy_has_grad,
        )
        if group is None:
            return stats
        columns = torch.stack([stats.logprobs, stats.entropy, stats.is_top.to(stats.logprobs.dtype)], dim=1)
        logprobs, entropy, is_top = group.join(columns, batch).unbind(1)
        return TokenStats(logprobs, entropy if entropy_has_grad else entropy.detach(), is_top > 0)


class ScalarModel(nn.Module):
    """A sequence-classification model of one label: [N] `score` of the hidden state at each position.

    Positions come from lengths. The library's own pooling looks for the last token that is not the pad token,
    and with pad == EOS it skips the final EOS.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.sequence_group: SequenceGroup | None = None

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        group = self.sequence_group
        head = self.model.get_submodule("score")
        scores = head(hidden_states(self.model, group.part(batch) if group else batch)).squeeze(-1).float()
        return group.join(scores, batch) if group else scores


def hidden_states(model: PreTrainedModel, batch: TokenBatch) -> torch.Tensor:
    """[N, H] last hidden states at the selected positions."""
    backbone = getattr(model, model.base_model_prefix)
    positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    cuts = {"sequence_lengths": batch.lengths} if model.config._attn_implementation == BY_ROWS else {}
    mask = None if batch.answer_ids is None else _own_answer(batch.answer_ids)
    hidden = backbone(
        input_ids=batch.input_ids, attention_mask=mask, use_cache=False, **positions, **cuts
    ).last_hidden_state
    return hidden.flatten(0, 1)[batch.select]


def _own_answer(answer_ids: torch.Tensor) -> torch.Tensor:
    """[b, 1, t, t] True where a query sees a key: not later, and in the prompt or in its own answer."""
    keys, queries = answer_ids[:, None, None, :], answer_ids[:, None, :, None]
    return ((keys == 0) | (keys == queries)).tril()
