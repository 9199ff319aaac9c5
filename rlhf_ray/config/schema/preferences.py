"""Collecting preferences: who is asked, and about what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf_ray.config.schema.base import DatasetSection, Fraction, ModelSection, Positive, Section


class SimulatedAnnotator(Section):
    """Prefers the answer with the higher gold reward, with noise.

    P(prefers a over b) = (1 - error_rate) * sigmoid((gold(a) - gold(b)) / temperature) + error_rate / 2;
    temperature 0 is a deterministic annotator.
    """

    type: Literal["simulated"] = "simulated"
    name: str = "simulated"
    function: str = Field("rlhf_ray.rewards.gold:friendliness", description="import path of the gold reward")
    temperature: float = Field(0.0, ge=0)
    error_rate: Fraction = 0.0


class FileAnnotator(Section):
    """Existing human preferences: a dataset with chosen and rejected, instead of generated answers."""

    type: Literal["file"]
    name: str = "human"
    dataset: DatasetSection


Annotator = Annotated[SimulatedAnnotator | FileAnnotator, Field(discriminator="type")]


class PreferencesSection(Section):
    """Answers prompts several times and asks annotators which answer is better."""

    model: ModelSection | None = None
    dataset: DatasetSection | None = Field(None, description="prompts; none if all annotators are files")
    annotators: tuple[Annotator, ...] = (SimulatedAnnotator(),)
    num_generations: Annotated[int, Field(ge=2)] = 4
    pairs_per_prompt: Positive = 2
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_completion_length: Positive = 64
    prompts_per_step: Positive = 32
