"""Gold rewards: what the simulated annotators really want, and what training never sees directly.

The protocol is that of Gao et al. 2023, "Scaling laws for reward model over-optimization": a known reward
plays the person, a reward model learns it from comparisons, and the policy is trained on the model, so one
can watch how far the two part.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    from rlhf_ray.types import Message


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def friendliness(prompts: list[list[Message]], completions: list[str], **columns: object) -> list[float]:
    """How friendly and upbeat an answer sounds, -1 to 1: VADER's compound score (Hutto and Gilbert 2014).

    An empty answer scores -1: silence is not friendly.
    """
    return [_analyzer().polarity_scores(text)["compound"] if text.strip() else -1.0 for text in completions]
