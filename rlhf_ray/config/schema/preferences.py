"""Collecting preferences: who is asked, and about what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.schema.base import (
    EMBEDDED_CONSTITUTION,
    DatasetSection,
    Fraction,
    ModelSection,
    Positive,
    Section,
)


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


class ConstitutionAnnotator(Section):
    """A model that prefers one of two answers by a principle, drawn at random for each pair (Bai et al. 2022,
    Constitutional AI, section 4.1).

    P(prefers a over b) = mean over both orders of showing them of P(option of a) / (P("(A)") + P("(B)")).
    """

    type: Literal["constitution"]
    name: str = "constitution"
    principles: str = Field(EMBEDDED_CONSTITUTION, description="a YAML file, or the embedded constitution")
    model: ModelSection | None = Field(
        None, description="the feedback model; null: the model that answers, in the same engine"
    )
    num_principles: Positive = Field(1, description="different principles a pair, averaged over")
    max_probability: float = Field(
        1.0,
        gt=0.5,
        le=1,
        description="surer preferences are clamped to it, and to 1 minus it; the paper: 0.6",
    )


Annotator = Annotated[SimulatedAnnotator | FileAnnotator | ConstitutionAnnotator, Field(discriminator="type")]


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

    @model_validator(mode="after")
    def _different_names(self) -> PreferencesSection:
        names = [annotator.name for annotator in self.annotators]
        if len(set(names)) != len(names):
            raise ValueError(f"annotators: names must differ, these do not: {', '.join(names)}")
        return self
