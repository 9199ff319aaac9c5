"""Annotators that compare answers. Here: simulated ones, who know a gold reward and judge it with noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from rlhf_ray.config.schema import ModelSection, SimulatedAnnotator
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.rewards.functions import RewardFunction
from rlhf_ray.seeds import derive_seed
from rlhf_ray.types import JudgedPair, Rollouts


def preference_probability(
    gold_first: float, gold_second: float, temperature: float, error_rate: float
) -> float:
    """P(the second answer is preferred), by Bradley-Terry, with votes at random now and then.

    (1 - error_rate) * sigmoid((gold_second - gold_first) / temperature) + error_rate / 2, where temperature 0
    sees every difference.
    """
    difference = gold_second - gold_first
    if temperature == 0:
        sure = 0.5 if difference == 0 else float(difference > 0)
    else:
        sure = 0.5 * (1 + math.tanh(difference / temperature / 2))
    return (1 - error_rate) * sure + error_rate / 2


class AnnotatorWorker:
    """All simulated annotators of a stage.

    Args:
        pairs_per_prompt: at most; two answers that are the same but for spaces around them are no pair, and
            an empty answer is in none.
    """

    def __init__(
        self, annotators: Sequence[SimulatedAnnotator], policy: ModelSection, pairs_per_prompt: int, seed: int
    ) -> None:
        self.annotators = tuple(annotators)
        self.functions = [RewardFunction(a.name, a.function) for a in annotators]
        self.tokenizer = load_tokenizer(policy)
        self.pairs_per_prompt = pairs_per_prompt
        self.seed = seed

    def annotate(self, rollouts: Rollouts) -> list[JudgedPair]:
        """Pair up the answers to each prompt and let every annotator vote on every pair.

        Raises:
            RewardError: a gold reward failed.
        """
        texts = self.tokenizer.batch_decode(
            [r.tolist() for r in rollouts.responses], skip_special_tokens=True
        )
        gold = [function(rollouts.messages, texts, rollouts.columns) for function in self.functions]
        judged = []
        for prompt_id in dict.fromkeys(rollouts.prompt_ids.tolist()):
            rows = np.flatnonzero(rollouts.prompt_ids == prompt_id)
            pairs = self._pairs(prompt_id, [int(row) for row in rows], texts)
            for number, (first, second) in enumerate(pairs):
                judged.append(
                    JudgedPair(
                        prompt_id=prompt_id,
                        messages=rollouts.messages[first],
                        answers=(texts[first], texts[second]),
                        votes={
                            annotator.name: self._vote(index, prompt_id, number, gold[index][[first, second]])
                            for index, annotator in enumerate(self.annotators)
                        },
                        gold={
                            annotator.name: (float(gold[index][first]), float(gold[index][second]))
                            for index, annotator in enumerate(self.annotators)
                        },
                    )
                )
        return judged

    def _pairs(self, prompt_id: int, rows: list[int], texts: list[str]) -> list[tuple[int, int]]:
        """Different, non-empty answers, in a random order of pairs that depends on the prompt alone."""
        usable = {texts[row].strip(): row for row in reversed(rows) if texts[row].strip()}
        pairs = list(itertools.combinations(sorted(usable.values()), 2))
        generator = np.random.default_rng(derive_seed(self.seed, prompt_id))
        order = generator.permutation(len(pairs))[: self.pairs_per_prompt]
        # Which answer comes first is random too, so that "the first" is no hint.
        swapped = generator.random(len(order)) < 0.5
        return [pairs[i][::-1] if swap else pairs[i] for i, swap in zip(order, swapped, strict=True)]

    def _vote(self, annotator: int, prompt_id: int, pair: int, gold: np.ndarray) -> int:
        section = self.annotators[annotator]
        probability = preference_probability(
            float(gold[0]), float(gold[1]), section.temperature, section.error_rate
        )
        generator = np.random.default_rng(derive_seed(self.seed, prompt_id, pair, annotator + 1))
        return int(generator.random() < probability)
