"""A language model as judge, by the probabilities that it gives to a few replies (Zheng et al. 2023, "Judging
LLM-as-a-judge"; expected value over the replies as in Liu et al. 2023, G-Eval, section 2)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.schema import JudgeReward
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.engines.options import choice_probabilities, option_logprobs
from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.source import Samples, Values
from rlhf_ray.types import Message, Ragged


class JudgeSource:
    """
    Args:
        section: with the template itself, not its file's name.
        token_logprobs: of the judge's engine. formatter: of the judge's model.
        max_length: tokens that the engine takes, reply included.
    """

    def __init__(
        self,
        section: JudgeReward,
        token_logprobs: Callable[[Ragged], Ragged],
        formatter: ChatFormatter,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ) -> None:
        assert section.is_inline
        self.section = section
        self.token_logprobs = token_logprobs
        self.formatter = formatter
        self.options = [
            list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in section.options
        ]
        if not all(self.options):
            raise ConfigError(f"reward '{section.name}': options: a reply has no tokens in the judge's model")
        self.values = np.asarray(list(section.options.values()))
        self.max_prompt = max_length - max(map(len, self.options))

    async def score(self, samples: Samples) -> Values:
        prefixes = [self._prefix(*turns) for turns in zip(samples.prompts, samples.completions, strict=True)]
        failures = {
            row: f"the judge's question has {len(ids)} tokens, and {self.max_prompt} fit; raise max_length"
            for row, ids in enumerate(prefixes)
            if len(ids) > self.max_prompt
        }
        asked = [row for row in range(len(samples)) if row not in failures]
        logprobs = option_logprobs(self.token_logprobs, [prefixes[row] for row in asked], self.options)
        rewards = np.full(len(samples), np.nan, dtype=np.float32)
        rewards[asked] = choice_probabilities(logprobs) @ self.values
        return Values(rewards, failures=failures)

    def _prefix(self, prompt: Sequence[Message], completion: str) -> list[int]:
        text = fill_template(self.section.template, prompt, completion)
        return self.formatter.prompt_ids([{"role": "user", "content": text}])

    def close(self) -> None:
        pass


def fill_template(template: str, prompt: Sequence[Message], completion: str) -> str:
    """Braces in what is filled in stay as they are."""
    fields = {"{prompt}": transcript(prompt), "{completion}": completion}
    return re.sub(r"\{prompt\}|\{completion\}", lambda found: fields[found[0]], template)


def transcript(messages: Sequence[Message]) -> str:
    """A single turn as it is; several with the role before each."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in messages)
