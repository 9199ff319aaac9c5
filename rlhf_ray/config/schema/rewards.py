"""Sources of reward of the online stage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.schema.base import NonNegative, Positive, Section

JUDGE_TEMPLATE = """\
Here is what a person wrote, and the answer that they got.

Person:
{prompt}

Answer:
{completion}

Is this a good answer? Reply with one word, Yes or No."""


class Source(Section):
    """What all sources share.

    weight: with 0 it is computed and shown, and not trained on: a gold score beside the proxy.
    on_error: what happens when a source fails (raises, does not answer in time, answers nonsense). `raise`
    ends the run at once; `retry` tries again up to `max_retries` times, with growing waits, before it ends
    the run; `mask` tries as often, and then leaves the samples out of training. A reward model is asked once:
    it would say the same again.
    """

    name: str = Field(min_length=1)
    weight: float = 1.0
    on_error: Literal["raise", "retry", "mask"] = "raise"
    max_retries: NonNegative = 2


class ModelReward(Source):
    """A trained reward model; without a path, the one that this pipeline's `reward` stage made.

    With the policy's tokenizer and chat template it reads the very tokens that were sampled; else the
    conversation and the decoded answer are written anew, by the reward model's own.
    """

    type: Literal["model"]
    name: str = Field("proxy", min_length=1)
    path: str | None = None
    chat_template: str | None = Field(None, description="as of `model`; default: the reward model's own")


class EnsembleReward(Source):
    """Several reward models. `pessimistic` is their mean less spread_coef standard deviations over the
    members: what they disagree about earns less (Coste et al. 2023, uncertainty-weighted optimisation)."""

    type: Literal["ensemble"]
    name: str = Field("proxy", min_length=1)
    paths: tuple[str, ...]
    chat_template: str | None = None
    aggregate: Literal["mean", "pessimistic"] = "mean"
    spread_coef: float = Field(1.0, ge=0)

    @field_validator("paths")
    @classmethod
    def _several(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        if len(paths) < 2:
            raise ValueError("needs at least two reward models")
        return paths


class FunctionReward(Source):
    """A Python function `f(prompts, completions, **columns) -> list[float | None]` by import path
    `module:name`, sync or async; None says that the reward does not apply.

    timeout: seconds a batch; the function then runs in a process of its own, which is killed when they are
    over.
    """

    type: Literal["function"]
    function: str
    timeout: float | None = Field(None, gt=0)


class HttpReward(Source):
    """A server that is sent prompts and answers and sends back rewards (docs/reward-server.md).

    timeout: seconds a request. token_env: name of the environment variable with the bearer token.
    """

    type: Literal["http"]
    url: str
    batch_size: Positive = 32
    timeout: float = Field(60.0, gt=0)
    max_concurrency: Positive = 8
    token_env: str | None = Field(None, min_length=1)
    on_error: Literal["raise", "retry", "mask"] = "retry"
    max_retries: NonNegative = 3

    @field_validator("url")
    @classmethod
    def _is_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"is no URL ({error}); write http://host:port/path") from error
        if parts.scheme not in ("http", "https") or not host:
            raise ValueError("must be http://host:port/path or https://…")
        return url

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        if urlsplit(self.url).username is not None:
            # The value is not repeated.
            raise ValueError("url=***: holds a password, which run.json would show; use token_env instead")
        return self


class JudgeReward(Source):
    """A language model that is shown prompt and answer, and chooses between a few words.

    The reward is the expected value of its choice, by its own probabilities of the options.

    path: by default the model that this stage starts from. All judges of a stage share one model.
    template: text with {prompt} and {completion}, or the file that it stands in.
    options: what the judge may reply -> value of that reply. Best words of one token each: a longer one is
    less likely by each of its tokens.
    max_length: tokens of the filled-in template; a longer one is a failure of that sample.
    """

    type: Literal["judge"]
    path: str | None = None
    chat_template: str | None = None
    template: str = JUDGE_TEMPLATE
    options: dict[str, float] = Field({"Yes": 1.0, "No": 0.0})
    max_length: Positive = 2048

    @field_validator("options")
    @classmethod
    def _differ(cls, options: dict[str, float]) -> dict[str, float]:
        if len(set(options.values())) < 2:
            raise ValueError("needs at least two replies with different values")
        if not all(options):
            raise ValueError("a reply is empty; give every option some text")
        return options

    @property
    def is_inline(self) -> bool:
        """Whether `template` is the text itself, and not a file's name."""
        return "{completion}" in self.template


class Verifier(Source):
    """A reward that is computed from text, in a process of its own.

    timeout: seconds an answer. The process is then killed, and that sample alone has failed. Without it the
    reward is computed beside the reward models, and may hold them up.
    """

    timeout: float | None = Field(20.0, gt=0)


class AnswerVerifier(Verifier):
    """One that compares the completion's answer with a right one.

    extract: a regular expression with one group, whose last match is the answer; 0 where it does not match.
    By default the completion without spaces around it is the answer.
    """

    extract: str | None = None

    @field_validator("extract")
    @classmethod
    def _one_group(cls, extract: str | None) -> str | None:
        if extract is not None and _compiled(extract).groups != 1:
            raise ValueError("must have exactly one group, around the answer; write others as (?:…)")
        return extract


class ReasoningGymReward(AnswerVerifier):
    """The scorer of the reasoning_gym task that the prompt came from (`dataset.path: reasoning_gym:TASK`).

    threshold: 1 for scores of at least this, else 0; some scorers give junk a little credit. null keeps
    partial credit.
    """

    type: Literal["reasoning_gym"]
    name: str = Field("reasoning_gym", min_length=1)
    threshold: float | None = Field(1.0, gt=0, le=1)


class MathReward(AnswerVerifier):
    """1 if the answer equals the one in the dataset's column as mathematics (1/2 = 0.5), else 0.

    Does not apply to rows whose right answer cannot be read: numbers may stand alone, other mathematics
    wants LaTeX, with a backslash in it or between $.
    """

    type: Literal["math"]
    name: str = Field("math", min_length=1)
    column: str = "answer"


class ExactMatchReward(AnswerVerifier):
    """1 if the answer is the text in the dataset's column, spaces around both left out, else 0."""

    type: Literal["exact_match"]
    name: str = Field("exact_match", min_length=1)
    column: str = "answer"
    ignore_case: bool = False


class RegexReward(Verifier):
    """1 if a regular expression is found in the completion, else 0.

    column: of the dataset, with a pattern a row, instead of one pattern for all.
    """

    type: Literal["regex"]
    name: str = Field("regex", min_length=1)
    pattern: str | None = None
    column: str | None = None

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            _compiled(pattern)
        return pattern

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.pattern is None) == (self.column is None):
            raise ValueError("pattern: give either pattern or column")
        return self


class FormatReward(Verifier):
    """1 if a regular expression matches the whole completion, else 0; `.` matches line ends too."""

    type: Literal["format"]
    name: str = Field("format", min_length=1)
    pattern: str

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        _compiled(pattern)
        return pattern


class LengthReward(Source):
    """How long the completion is, in tokens with the EOS; from 0 down to -1.

    max_tokens: 0 up to it, then falling in a straight line to -1 within `buffer` tokens (Yu et al. 2025,
    DAPO, equation 13). target: minus the distance from it, as a share of it.
    """

    type: Literal["length"]
    name: str = Field("length", min_length=1)
    max_tokens: Positive | None = None
    buffer: Positive | None = Field(None, description="default: as much as max_tokens")
    target: Positive | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.max_tokens is None) == (self.target is None):
            raise ValueError("max_tokens: give either max_tokens or target")
        if self.buffer is not None and self.max_tokens is None:
            raise ValueError(f"buffer={self.buffer}: belongs to max_tokens; remove it")
        return self


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from error


Reward = Annotated[
    ModelReward
    | EnsembleReward
    | FunctionReward
    | HttpReward
    | JudgeReward
    | ReasoningGymReward
    | MathReward
    | ExactMatchReward
    | RegexReward
    | FormatReward
    | LengthReward,
    Field(discriminator="type"),
]
TextVerifier = ReasoningGymReward | MathReward | ExactMatchReward | RegexReward | FormatReward


def judge_mistakes(rewards: Sequence[Reward]) -> list[str]:
    """One engine serves all judges."""
    judges = [reward for reward in rewards if isinstance(reward, JudgeReward)]
    if len({(judge.path, judge.chat_template) for judge in judges}) > 1:
        return ["rewards: all judges share one engine; give them the same path and chat_template"]
    return []
