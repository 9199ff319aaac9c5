"""AI feedback: a model compares two answers by a principle (Bai et al. 2022, Constitutional AI, sec. 4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.schema import ConstitutionAnnotator
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.constitution import ANSWER_LEAD, OPTIONS, Constitution, Principle, choice_messages
from rlhf_ray.engines.options import choice_probabilities, option_logprobs
from rlhf_ray.roles import LogprobEngine
from rlhf_ray.seeds import derive_seed
from rlhf_ray.types import JudgedPair, Judgement, Metrics, Prompts, Ragged

SLACK = 64
"""Tokens. Text that was sampled may be encoded to more tokens than it was sampled as."""


class FeedbackAnnotator:
    """
    Args:
        formatter, engine: of the feedback model.
        max_model_len: tokens that the engine takes; a pair whose question is longer is not judged.
    """

    def __init__(
        self,
        section: ConstitutionAnnotator,
        constitution: Constitution,
        formatter: ChatFormatter,
        engine: LogprobEngine,
        max_model_len: int,
        seed: int,
    ) -> None:
        self.section = section
        self.constitution = constitution
        self.formatter = formatter
        self.engine = engine
        self.seed = seed
        self.lead = formatter.text_ids(ANSWER_LEAD)
        self.options = [formatter.text_ids(option) for option in OPTIONS]
        # Engines sample one token when they score.
        self.longest = max_model_len - 1 - max(map(len, self.options))

    def judge(self, pairs: Sequence[JudgedPair]) -> list[JudgedPair]:
        """The pairs with this annotator's opinion; the principles depend on the prompt and on which of its
        pairs it is, not on how pairs are batched.

        Args:
            pairs: all those of each prompt.
        """
        seen: Counter[int] = Counter()
        asked: list[tuple[int, Principle]] = []
        prefixes: list[list[int]] = []
        for index, pair in enumerate(pairs):
            principles = self.principles_for(pair.prompt_id, seen[pair.prompt_id])
            seen[pair.prompt_id] += 1
            questions = [
                self.question(principle, pair, swapped)
                for principle in principles
                for swapped in (False, True)
            ]
            if max(map(len, questions)) <= self.longest:
                asked += [(index, principle) for principle in principles]
                prefixes += questions
        second = self._second_is_better(prefixes)
        judgements: dict[int, list[Judgement]] = {}
        for (index, principle), (straight, swapped) in zip(asked, second, strict=True):
            said = Judgement(self.section.name, principle.id, float(straight), float(swapped))
            judgements.setdefault(index, []).append(said)
        return [self._with(pair, judgements.get(index, [])) for index, pair in enumerate(pairs)]

    def principles_for(self, prompt_id: int, number: int) -> list[Principle]:
        """Different ones, drawn at random."""
        generator = np.random.default_rng(derive_seed(self.seed, prompt_id, number))
        principles = self.constitution.principles
        chosen = generator.choice(len(principles), size=self.section.num_principles, replace=False)
        return [principles[index] for index in chosen]

    def question(self, principle: Principle, pair: JudgedPair, swapped: bool) -> list[int]:
        """Token ids up to the option that the model would choose; swapped: answer 1 is shown as (A)."""
        answers = pair.answers[::-1] if swapped else pair.answers
        return self.formatter.prompt_ids(choice_messages(principle, pair.messages, answers)) + self.lead

    def _second_is_better(self, prefixes: list[list[int]]) -> NDArray[np.float64]:
        """[N, 2] for questions in both orders, flat: the probability of answer 1, be it (B) or, swapped,
        (A)."""
        chosen = choice_probabilities(option_logprobs(self._token_logprobs, prefixes, self.options))
        return np.stack([chosen[0::2, 1], chosen[1::2, 0]], axis=1)

    def _token_logprobs(self, sequences: Ragged) -> Ragged:
        return Ragged.concat([chunk.result() for chunk in self.engine.token_logprobs(sequences)])

    def _with(self, pair: JudgedPair, judgements: Sequence[Judgement]) -> JudgedPair:
        if not judgements:
            return pair
        name, limit = self.section.name, self.section.max_probability
        mean = float(np.mean([judgement.probability for judgement in judgements]))
        probability = min(max(mean, 1 - limit), limit)
        vote = {} if probability == 0.5 else {name: int(probability > 0.5)}
        return replace(
            pair,
            votes={**pair.votes, **vote},
            probabilities={**pair.probabilities, name: probability},
            judgements=(*pair.judgements, *judgements),
        )


def longest_question(
    constitution: Constitution, formatter: ChatFormatter, prompts: Prompts, max_completion_length: int
) -> int:
    """Tokens that an engine must take to compare any two answers to the prompts."""
    principle = max(constitution.principles, key=lambda principle: len(principle.choice))
    without = max(
        len(formatter.prompt_ids(choice_messages(principle, messages, ("", ""))))
        for messages in prompts.messages
    )
    reply = len(formatter.text_ids(ANSWER_LEAD + OPTIONS[0])) + 1
    return without + 2 * max_completion_length + reply + SLACK


def feedback_metrics(pairs: Sequence[JudgedPair]) -> Metrics:
    """How much the place of an answer weighs, how sure the feedback models are, and which principles they
    judged by; nothing where none was asked.

    `preferences/order_disagreement` is the share of judgements that turn when the answers change places;
    `preferences/certainty` is the mean of |P - 0.5| over pairs, 0 to 0.5; `preferences/unjudged` counts pairs
    whose question was too long.
    """
    judgements = [judgement for pair in pairs for judgement in pair.judgements]
    if not judgements:
        return {}
    certainty = [abs(p - 0.5) for pair in pairs for p in pair.probabilities.values()]
    counts = Counter(judgement.principle for judgement in judgements)
    return {
        "preferences/order_disagreement": float(np.mean([j.depends_on_order for j in judgements])),
        "preferences/certainty": float(np.mean(certainty)),
        "preferences/unjudged": float(sum(not pair.judgements for pair in pairs)),
        **{f"preferences/principle/{name}": float(count) for name, count in sorted(counts.items())},
    }
