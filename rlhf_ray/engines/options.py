"""Answers by choice: how likely a model is to go on with each of a few given texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.types import Ragged


def option_logprobs(
    token_logprobs: Callable[[Ragged], Ragged],
    prefixes: Sequence[Sequence[int]],
    options: Sequence[Sequence[int]],
) -> NDArray[np.float64]:
    """[N, num_options] log P(option | prefix): the sum of the log-probs of the option's tokens.

    Args:
        token_logprobs: of an engine (`TokenGenerator.token_logprobs`), at temperature 1.
        prefixes: [N] token ids, at least one each.
        options: [num_options] token ids that may follow, at least one each. A longer option is the less
            likely one by each of its tokens; those that are to compete fairly have equal lengths.
    """
    assert all(prefixes) and all(options), "no prefix and no option is empty"
    rows = [[*prefix, *option] for prefix in prefixes for option in options]
    if not rows:
        return np.empty((0, len(options)))
    logprobs = token_logprobs(Ragged.from_rows(rows, np.int32))
    lengths = [len(option) for _ in prefixes for option in options]
    sums = [row[-length:].astype(np.float64).sum() for row, length in zip(logprobs, lengths, strict=True)]
    return np.asarray(sums).reshape(len(prefixes), len(options))


def choice_probabilities(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N, num_options] the options' probabilities given that one of them is chosen: softmax over options."""
    weights = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))
