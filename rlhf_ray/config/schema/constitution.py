"""Constitutional AI, the supervised half: the model corrects its own answers and learns from them."""

from __future__ import annotations

from pydantic import Field, model_validator

from rlhf_ray.config.schema.base import (
    EMBEDDED_CONSTITUTION,
    DatasetSection,
    ModelSection,
    OptimizerSection,
    Positive,
    Section,
)


class ConstitutionSection(Section):
    """The model answers prompts that invite harm, criticises and revises its answers by principles that are
    drawn at random, and is fine-tuned on the last revisions and on helpful examples (Bai et al. 2022,
    Constitutional AI, section 3).

    Its other half, preferences by a feedback model, is the annotator `constitution` of `preferences`.
    """

    model: ModelSection | None = None
    principles: str = Field(EMBEDDED_CONSTITUTION, description="a YAML file, or the embedded constitution")
    dataset: DatasetSection = Field(description="prompts")
    num_rounds: Positive = Field(1, description="critiques, each with a revision, an answer")
    num_generations: Positive = Field(1, description="answers a prompt, each revised by itself")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_completion_length: Positive = Field(64, description="tokens of an answer, and of a revision")
    max_critique_length: Positive = 64
    prompts_per_step: Positive = 32

    helpful_dataset: DatasetSection | None = Field(
        None, description="examples as of `sft`, mixed in so that the model stays helpful"
    )
    helpful_fraction: float | None = Field(
        None, gt=0, lt=1, description="of all rows, if there are enough; null takes all helpful examples"
    )
    eval_dataset: DatasetSection | None = Field(None, description="held-out examples as of `sft`")
    num_epochs: Positive = 1
    max_steps: Positive | None = Field(None, description="stop early, whatever num_epochs says")
    batch_size: Positive = 16
    max_length: Positive = 512
    eval_every: Positive | None = None
    optimizer: OptimizerSection = OptimizerSection(learning_rate=2e-5)

    @model_validator(mode="after")
    def _fraction_of_something(self) -> ConstitutionSection:
        if self.helpful_fraction is not None and self.helpful_dataset is None:
            raise ValueError(
                f"helpful_fraction={self.helpful_fraction}: there is no helpful_dataset; name one, or remove "
                "helpful_fraction"
            )
        return self
