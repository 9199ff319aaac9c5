"""What sections are made of, and the sections that every stage uses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from rlhf_ray.config.document import Raw, redacted

EMBEDDED_MODEL = "embedded:smollm2-135m-instruct"
EMBEDDED_TEMPLATES = ("embedded:chatml", "embedded:sums")
EMBEDDED_CONSTITUTION = "embedded:constitution"

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Options with keys of one's own may hold secrets, and a section may stand in a message."""
        for name, value in super().__repr_args__():
            yield name, redacted(cast(Raw, value)) if isinstance(value, dict) else value


class ModelSection(Section):
    """
    path: a Hugging Face folder, a hub name, a `.gguf` file, or the embedded model.
    chat_template: a Jinja file that replaces the tokenizer's own template; or `embedded:chatml`: ChatML
    without a system prompt; or `embedded:sums`: plain text that begins with two solved sums. It is saved with
    what is trained.
    """

    path: str = EMBEDDED_MODEL
    chat_template: str | None = None
    trust_remote_code: bool = False


class DatasetSection(Section):
    """
    path: a JSONL, JSON, CSV or Parquet file (also .gz), a hub name, `embedded:NAME` (demonstrations, prompts,
    red-team, guess), or `reasoning_gym:TASK`: questions made by that task with its `options`, as many as
    `limit` says (by default 1000), whose answers the reward `reasoning_gym` scores.
    """

    path: str
    split: str = "train"
    name: str | None = Field(None, description="the hub dataset's configuration")
    limit: Positive | None = Field(
        None, description="use only the first rows, after shuffling by the run's seed"
    )
    options: dict[str, JsonValue] = Field({}, description="of the reasoning_gym task")
    prompt_suffix: str | None = Field(None, description="put after every question of the reasoning_gym task")


class OptimizerSection(Section):
    """AdamW."""

    learning_rate: float = Field(1e-5, gt=0, lt=1)
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegative = 0
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
