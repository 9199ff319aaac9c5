"""From ragged sequences to the rectangles that a model takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.config.schema import Layout
from rlhf_ray.types import Ragged
from rlhf_ray.types.ragged import Array


@dataclass(frozen=True)
class TokenBatch:
    """Input of one forward pass, and which of its positions matter.

    Fields:
        input_ids: [b, t] right-padded rows, or one packed row [1, sum of lengths].
        position_ids: like input_ids, where rows hold several sequences; else None. In a packed row they
            restart at 0 with each sequence; behind a shared prompt each answer goes on from it. No attention
            mask is needed but for shared prompts: with right padding a causal model's real tokens never see
            the padding, and packed rows are kept apart by their restarting positions.
        select: [N] indices into the flattened [b * t] positions, in the order of sequences and then tokens.
        targets: [N] the token that follows each selected position (0 after a sequence's last).
        lengths: of the sequences in a packed row.
        answer_ids: like input_ids, where prompts are shared: 0 in the prompt, else the number of the answer.
            A token sees the prompt and its own answer.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    select: torch.Tensor
    targets: torch.Tensor
    lengths: list[int] | None = None
    answer_ids: torch.Tensor | None = None


def collate(
    sequences: Ragged,
    is_source: NDArray[np.bool_],
    layout: Layout,
    device: torch.device,
    prompts: Ragged | None = None,
) -> TokenBatch:
    """
    Args:
        sequences: b rows of token ids, int32.
        is_source: [sum of lengths] True at the positions whose hidden state is wanted.
        prompts: b rows, the beginnings of the sequences, for the layout `shared`; where there are none, or no
            two are equal, that is `padded`.

    An empty batch (b = 0) becomes one row of one token with nothing selected: a rank that has no rows left
    must still take part in the forward passes of the others.
    """
    if len(sequences) == 0:
        token = torch.zeros((1, 1), dtype=torch.long, device=device)
        nothing = torch.empty(0, dtype=torch.long, device=device)
        is_packed = layout == "packed"
        return TokenBatch(token, token if is_packed else None, nothing, nothing, [1] if is_packed else None)
    following = np.append(sequences.values[1:], 0).astype(np.int64)
    following[sequences.offsets[1:] - 1] = 0
    if layout == "shared" and prompts is not None and _is_shared(prompts):
        needed = _needed(sequences, is_source, prompts)
        sequences, following, is_source = sequences.masked(needed), following[needed], is_source[needed]
        rectangle = _behind_prompts(sequences, prompts)
    elif layout == "packed":
        rectangle = _Rectangle((1, len(following)), np.arange(len(following)))
    else:
        width = int(sequences.lengths.max())
        rectangle = _Rectangle((len(sequences), width), sequences.row_ids * width + column_ids(sequences))

    def filled(values: Array | None) -> torch.Tensor | None:
        return None if values is None else torch.from_numpy(rectangle.filled(values)).to(device)

    has_several = layout == "packed" or rectangle.answer_ids is not None
    input_ids = filled(sequences.values)
    assert input_ids is not None
    return TokenBatch(
        input_ids=input_ids,
        position_ids=filled(column_ids(sequences) if has_several else None),
        select=torch.from_numpy(rectangle.places[is_source]).to(device),
        targets=torch.from_numpy(following[is_source]).to(device),
        lengths=sequences.lengths.tolist() if layout == "packed" else None,
        answer_ids=filled(rectangle.answer_ids),
    )


@dataclass(frozen=True)
class _Rectangle:
    """Where the tokens of ragged sequences stand in a rectangle.

    Fields:
        shape: (b, t). places: [sum of lengths] index of each token in the flattened rectangle.
        answer_ids: [sum of lengths] as in `TokenBatch`, or None.
    """

    shape: tuple[int, int]
    places: NDArray[np.int64]
    answer_ids: NDArray[np.int64] | None = None

    def filled(self, values: Array) -> NDArray[np.int64]:
        grid = np.zeros(self.shape[0] * self.shape[1], dtype=np.int64)
        grid[self.places] = values
        return grid.reshape(self.shape)


def same_prompts(prompts: Ragged) -> NDArray[np.int64]:
    """[B] the number of each row's prompt, in the order in which prompts first appear."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(prompt.tobytes(), len(seen)) for prompt in prompts], dtype=np.int64)


def _is_shared(prompts: Ragged) -> bool:
    return int(same_prompts(prompts).max()) + 1 < len(prompts)


def _needed(sequences: Ragged, is_source: NDArray[np.bool_], prompts: Ragged) -> NDArray[np.bool_]:
    """[sum of lengths] False after the last source of an answer: nothing that is wanted sees it."""
    columns = column_ids(sequences)
    last = np.maximum.reduceat(np.where(is_source, columns, 0), sequences.offsets[:-1])
    return columns < np.repeat(np.maximum(last + 1, prompts.lengths), sequences.lengths)


def _behind_prompts(sequences: Ragged, prompts: Ragged) -> _Rectangle:
    """A row for each different prompt: the prompt, and all answers to it one behind the other."""
    groups = same_prompts(prompts)
    answer_lengths = sequences.lengths - prompts.lengths
    filled = np.zeros(int(groups.max()) + 1, dtype=np.int64)
    filled[groups] = prompts.lengths
    starts = np.empty(len(groups), dtype=np.int64)
    for row, group in enumerate(groups):
        starts[row] = filled[group]
        filled[group] += answer_lengths[row]
    width, rows, columns = int(filled.max()), sequences.row_ids, column_ids(sequences)
    in_answer = columns - prompts.lengths[rows]
    places = groups[rows] * width + np.where(in_answer < 0, columns, starts[rows] + in_answer)
    return _Rectangle((len(filled), width), places, np.where(in_answer < 0, 0, rows + 1))


def column_ids(sequences: Ragged) -> NDArray[np.int64]:
    """[sum of lengths] position of each token in its row."""
    return np.arange(len(sequences.values)) - np.repeat(sequences.offsets[:-1], sequences.lengths)


def before_targets(is_target: Ragged) -> NDArray[np.bool_]:
    """[sum of lengths] True at each position that predicts a target: the one before it in the same row.

    A target at a row's first token has no such position and is left out.
    """
    shifted = np.append(is_target.values[1:], False).astype(bool)
    shifted[is_target.offsets[1:] - 1] = False
    return shifted


def before_responses(prompt_lengths: NDArray[np.int64], sequences: Ragged) -> NDArray[np.bool_]:
    """[sum of lengths] True at each position that predicts a token after the row's prompt.

    That is one position a response token.
    """
    is_response = column_ids(sequences) >= np.repeat(prompt_lengths, sequences.lengths)
    return before_targets(sequences.with_values(is_response))


def last_positions(sequences: Ragged) -> NDArray[np.bool_]:
    """[sum of lengths] True at each row's last token, where a score is read."""
    is_last = np.zeros(len(sequences.values), dtype=bool)
    is_last[sequences.offsets[1:] - 1] = True
    return is_last
