"""Sequences whose tokens several ranks share, so that each keeps the activations of a part (DeepSpeed
Ulysses; Jacobs et al. 2023).

A rank computes consecutive columns of the rectangle. In attention the ranks exchange tokens for heads: each
sees the whole sequence, for some of the heads. What comes out, a number a token, is joined again, so that a
loss looks at whole sequences and is the same on every rank of the group; the gradients of the group's ranks
add up, as those of all ranks do.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf_ray.errors import ModelError
from rlhf_ray.models.batching import TokenBatch


class SequenceGroup:
    """The ranks that share sequences with this one.

    Args:
        model: whose attention will exchange, from now on.
        size: of the group: that many consecutive ranks, which are on one node as far as possible. Every rank
            of the world makes its group at the same time.

    Raises:
        ModelError: its heads cannot be divided.
    """

    def __init__(self, model: PreTrainedModel, rank: int, world_size: int, size: int) -> None:
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world_size, size)]
        self.group = groups[rank // size]
        self.rank = rank % size
        self.size = size
        _exchange_in_attention(model, self.group)

    def part(self, batch: TokenBatch) -> TokenBatch:
        """This rank's columns: the same rows, and the selected positions among them."""
        assert batch.answer_ids is None, "the configuration refuses shared prompts"
        rows, columns = self._places(batch)
        width, first = self._width(batch), self._width(batch) * self.rank
        mine = (columns >= first) & (columns < first + width)
        own = slice(first, first + width)
        return replace(
            batch,
            input_ids=self._filled(batch.input_ids, torch.zeros_like(batch.input_ids[:, :1]))[:, own],
            position_ids=self._positions(batch)[:, own],
            select=rows[mine] * width + columns[mine] - first,
            targets=batch.targets[mine],
        )

    def join(self, values: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """[N, …] of all selected positions of the whole batch, from those [n, …] of this rank's part."""
        _, columns = self._places(batch)
        joined: torch.Tensor = _Join.apply(values, columns // self._width(batch), self)
        return joined

    def _width(self, batch: TokenBatch) -> int:
        return -(-batch.input_ids.shape[1] // self.size)

    def _places(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """[N] row and column of each selected position."""
        width = batch.input_ids.shape[1]
        return batch.select // width, batch.select % width

    def _filled(self, grid: torch.Tensor, filling: torch.Tensor) -> torch.Tensor:
        """Up to a multiple of the group. What stands at a row's end is seen by nothing before it."""
        missing = -grid.shape[1] % self.size
        return torch.cat([grid, filling.expand(-1, missing)], dim=1) if missing else grid

    def _positions(self, batch: TokenBatch) -> torch.Tensor:
        positions = batch.position_ids
        if positions is None:
            steps = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
            positions = steps.expand_as(batch.input_ids)
        return self._filled(positions, positions[:, -1:] + 1)


class _Join(torch.autograd.Function):
    """Every rank goes on with the same values and computes the same loss of them: the gradient of its own is
    its part of what it has computed itself, and nothing is added up here."""

    @staticmethod
    def forward(ctx, values, owners, group):  # type: ignore[no-untyped-def]
        ctx.is_mine = owners == group.rank
        counts = torch.bincount(owners, minlength=group.size).tolist()
        padded = values.new_zeros((max(counts), *values.shape[1:]))
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group.group)
        joined = values.new_empty((len(owners), *values.shape[1:]))
        for owner, (part, count) in enumerate(zip(parts, counts, strict=True)):
            joined[owners == owner] = part[:count]
        return joined

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient[ctx.is_mine], None, None


def _exchange_in_attention(model: PreTrainedModel, group: dist.ProcessGroup) -> None:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    class Exchanging(UlyssesSPAttentionHF):
        def forward(self, module, query, key, value, attention_mask, *args, **kwargs):  # type: ignore[no-untyped-def]
            # The library's own wants equally many rows in every micro-batch.
            self.batch_size = query.shape[0]
            for name in ("required_query_shape", "required_key_value_shape", "required_context_shape"):
                first, _, *rest = getattr(self, name)
                setattr(self, name, torch.Size([first, self.batch_size, *rest]))
            # A mask would be that of this rank's columns alone; the whole is causal, or told by positions.
            return super().forward(module, query, key, value, None, *args, **kwargs)

    config = model.config.get_text_config()
    name = config._attn_implementation
    plain = inspect.unwrap(ALL_ATTENTION_FUNCTIONS[name])
    heads = config.num_attention_heads
    try:
        attention = Exchanging(
            attn=plain,
            batch_size=1,
            attn_head_count=heads,
            attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            kv_head_count=config.num_key_value_heads,
            num_hidden_layers=config.num_hidden_layers,
            process_group=group,
            seq_length_is_variable=True,
        )
    except (ValueError, AttributeError) as error:
        raise ModelError(
            f"training.sequence_parallel_size={dist.get_world_size(group)}: not with this model "
            f"({type(model).__name__}, attention {name}): {error}; choose a size that divides its heads"
        ) from error

    @functools.wraps(plain)
    def exchanging(module: nn.Module, *args: object, **kwargs: object) -> object:
        return attention(module, *args, **kwargs)

    # Under the name of what it wraps, since the library treats some kinds of attention by their names. A
    # process trains one model.
    ALL_ATTENTION_FUNCTIONS[name] = exchanging
