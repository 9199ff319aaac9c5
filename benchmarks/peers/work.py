"""The work that all arms of `end-to-end` do, as a file that a peer reads, and what each says of its steps."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path

from rlhf_ray.config.schema import ReasoningGymReward
from rlhf_ray.rewards.verifiers import text_verifier
from rlhf_ray.types import Message


@dataclass(frozen=True)
class Question:
    """Fields: id: its place in the dataset. token_ids: as the engine gets it. entry: for the scorer."""

    id: int
    messages: list[Message]
    token_ids: list[int]
    entry: dict[str, object]
    task_options: dict[str, object]


@dataclass(frozen=True)
class Work:
    """
    Fields:
        model: a Hugging Face folder. template: the text of its chat template.
        eos_ids: what ends an answer.
        steps: the questions of every step, in order.
        tokens_per_micro_batch: budget of padded tokens of one forward and backward pass.
        threads: CPU threads of whatever computes.
        uses_bfloat16: the trainer under autocast, and in the engine; else all computes in float32.
        extract: the answer within what was said, as a regular expression.
    """

    model: str
    template: str
    eos_ids: list[int]
    seed: int
    steps: list[list[Question]]
    num_generations: int
    max_prompt_length: int
    max_completion_length: int
    temperature: float
    learning_rate: float
    max_grad_norm: float
    cliprange: float
    importance_cap: float
    num_mini_batches: int
    tokens_per_micro_batch: int
    kv_cache_gib: float
    max_num_seqs: int
    threads: int
    uses_bfloat16: bool
    extract: str | None

    @property
    def samples_per_step(self) -> int:
        return len(self.steps[0]) * self.num_generations

    @property
    def rows_per_update(self) -> int:
        """Answers of an optimizer step."""
        return self.samples_per_step // self.num_mini_batches

    @property
    def rows_per_pass(self) -> int:
        """Of one forward and backward pass, where all are padded to one width."""
        longest = max(len(question.token_ids) for step in self.steps for question in step)
        width = longest + self.max_completion_length
        return rows_within(self.rows_per_update, width, self.tokens_per_micro_batch)

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> list[float]:
        """1 for each answer that is right, else 0: the reward of every arm."""
        verify = text_verifier(ReasoningGymReward(type="reasoning_gym", extract=self.extract))
        rewards = verify(
            [question.messages for question in questions],
            answers,
            entry=[question.entry for question in questions],
            task_options=[question.task_options for question in questions],
        )
        assert isinstance(rewards, list)
        return [float(reward or 0.0) for reward in rewards]

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Work:
        record = json.loads(path.read_text())
        steps = [[Question(**question) for question in step] for step in record.pop("steps")]
        return cls(**record, steps=steps)


def rows_within(rows: int, width: int, token_budget: int) -> int:
    """The largest whole part of `rows` whose rows of `width` tokens the budget holds; 1 at least."""
    parts = [part for part in range(1, rows + 1) if rows % part == 0]
    return max((part for part in parts if part * width <= token_budget), default=1)


def digest(prompts: Sequence[Sequence[int]]) -> str:
    """Equal for equal token ids in equal order."""
    text = json.dumps([[int(token) for token in prompt] for prompt in prompts])
    return blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Step:
    """
    Fields:
        seconds: wall time of the whole step. generate, train: parts of it; log-probs of the old policy are
            training.
        reward: mean over the answers.
        prompts: digest of the questions' token ids, one a question. answers: how many were sampled.
        prompt_tokens: of all answers' questions. answer_tokens: sampled. trained_tokens: with a loss.
    """

    seconds: float
    generate: float
    train: float
    reward: float
    prompts: str
    answers: int
    prompt_tokens: int
    answer_tokens: int
    trained_tokens: int

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens

    @property
    def rest(self) -> float:
        return self.seconds - self.generate - self.train


@dataclass
class Stopwatch:
    """Seconds by part; `with stopwatch("train"):`."""

    seconds: dict[str, float] = field(default_factory=dict)
    _part: str = ""
    _began: float = 0.0

    def __call__(self, part: str) -> Stopwatch:
        self._part = part
        return self

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._began
        self.seconds[self._part] = self.seconds.get(self._part, 0.0) + spent

    def take(self) -> dict[str, float]:
        """What was measured since the last time."""
        taken, self.seconds = self.seconds, {}
        return taken


def write_steps(path: Path, steps: Sequence[Step]) -> None:
    path.write_text(json.dumps([asdict(step) for step in steps]))


def read_steps(path: Path) -> list[Step]:
    return [Step(**step) for step in json.loads(path.read_text())]
