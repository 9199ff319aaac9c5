"""Conversations to token ids, the same way in all stages: what SFT teaches is what is sampled and scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

from rlhf_ray.errors import DataError, ModelError
from rlhf_ray.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
)


class ChatFormatter:
    """Renders conversations by a tokenizer's chat template.

    Attributes:
        eos_token_ids: every id that ends an answer, as the model's generation config lists them.
        eos_token_id: the one that is appended to an answer: the one by which the template ends an assistant
            turn, or the tokenizer's own (else the lowest id) where the template ends it by none of them.

    Raises:
        ModelError: the tokenizer has no chat template, or one that fails; there is no EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                "model.chat_template: the tokenizer has no chat template of its own; set model.chat_template "
                "to a Jinja file with the format that the model was trained on"
            )
        if not eos_token_ids:
            raise ModelError(
                "model.path: the model names no EOS token, so answers would never end; set eos_token_id in "
                "its generation_config.json"
            )
        self._tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self._eos_texts = {self._text_of(token): token for token in sorted(self.eos_token_ids)}
        ending = self._ending_of_turns()
        self._template_ends_turns = ending is not None
        own = (
            tokenizer.eos_token_id
            if tokenizer.eos_token_id in self.eos_token_ids
            else min(self.eos_token_ids)
        )
        self.eos_token_id: int = own if ending is None else ending

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The conversation with the header of the answer that is to come.

        The rendered text is encoded without special tokens: a template writes its own BOS.

        Raises:
            DataError: the template refuses this conversation (for example a system turn).
        """
        return self._encode(self._render(messages, answer_follows=True))

    def completion_ids(self, text: str) -> list[int]:
        """An answer with the EOS that ends it, which is appended unless the text ends in one already."""
        ids = self._encode(text)
        return ids if ids and ids[-1] in self.eos_token_ids else [*ids, self.eos_token_id]

    def text_ids(self, text: str) -> list[int]:
        """Text that stands within a turn, as it is."""
        return self._encode(text)

    def answer_text(self, token_ids: Sequence[int]) -> str:
        """What a sampled answer says, without the EOS that ends it."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def continuation_ids(self, messages: Sequence[Message]) -> list[int]:
        """What follows an answer's EOS: the rest of its turn, the given turns, the header of the next answer.

        Appended to a context that was sampled, they continue it, and nothing of it is encoded again. They do
        not depend on that context (see `check_continues`).

        Raises:
            DataError: the template refuses these turns.
            ModelError: the template, or the tokenizer, writes what came before otherwise once turns follow.
        """
        before, after = self._continued(PROBE, messages)
        ids_before, ids = self._encode(before), self._encode(before + after)
        if ids[: len(ids_before)] != ids_before:
            raise _not_continuing(before, before + after)
        return ids[len(ids_before) :]

    def check_continues(self) -> None:
        """
        Raises:
            ModelError: a conversation cannot be continued token by token: the template ends answers by no EOS
                token, or it drops or rewrites earlier turns.
        """
        if not self._template_ends_turns:
            raise ModelError(
                "model.chat_template: ends an assistant's turn by no EOS token, so a conversation cannot go "
                "on behind an answer that was sampled; use a template that does"
            )
        question = PROBE[:1]
        _, after_one = self._continued(PROBE, question)
        before, after_two = self._continued([*PROBE, *PROBE], question)
        if after_two != after_one:
            raise _not_continuing(before + after_one, before + after_two)

    def _continued(self, messages: Sequence[Message], more: Sequence[Message]) -> tuple[str, str]:
        """A conversation up to the EOS of its last answer, as it is when sampled; and what follows it."""
        answer = self._answer_text(messages, len(messages) - 1) + self._text_of(self.eos_token_id)
        before = self._render(messages[:-1], answer_follows=True) + answer
        whole = self._render([*messages, *more], answer_follows=True)
        if not whole.startswith(before):
            raise _not_continuing(before, whole)
        return before, whole[len(before) :]

    def sft_row(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation up to its last answer, and which of them are to be learned.

        Targets are the assistant's answers with the EOS of each; not the headers, nor what the template
        writes after an EOS. Everything before a learned answer i is exactly `prompt_ids(messages[:i])`. Where
        a tokenizer merges the beginning of an earlier answer with what stands before it, or the template
        shows earlier answers otherwise than last ones, no single row can hold both answers so; then only the
        later ones are targets.

        Raises:
            DataError: the template refuses this conversation, or there is no answer in it.
            ModelError: the template is not prefix-preserving.
        """
        ids: list[int] = []
        is_target: list[bool] = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.prompt_ids(messages[:turn])
            if prompt[: len(ids)] != ids:
                is_target = []
            answer = self.completion_ids(self._answer_text(messages, turn))
            is_target += [False] * (len(prompt) - len(is_target)) + [True] * len(answer)
            ids = prompt + answer
        if not ids:
            raise DataError("the conversation has no assistant turn")
        return ids, is_target

    def text_row(self, text: str) -> tuple[list[int], list[bool]]:
        """Plain text without roles: every token but the first, which nothing precedes, is a target.

        One BOS stands first if the tokenizer uses one, also when the text brings its own, and one EOS last.
        """
        ids = list(self._tokenizer(text, add_special_tokens=True)["input_ids"])
        bos = self._tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if not ids or ids[-1] not in self.eos_token_ids:
            ids.append(self.eos_token_id)
        return ids, [False] + [True] * (len(ids) - 1)

    def _answer_text(self, messages: Sequence[Message], turn: int) -> str:
        """The assistant's turn as the template writes it between header and EOS."""
        rendered = self._answer_of(messages, turn)
        return self._cut_at_eos(rendered)[0] if self._template_ends_turns else rendered

    def _answer_of(self, messages: Sequence[Message], turn: int) -> str:
        """What the template writes of the answer `messages[turn]`, from its header to the next turn."""
        prompt = self._render(messages[:turn], answer_follows=True)
        whole = self._render(messages[: turn + 1], answer_follows=False)
        if not whole.startswith(prompt):
            raise ModelError(
                "model.chat_template: not prefix-preserving: the conversation up to an answer, with the "
                f"generation prompt ({prompt[-80:]!r}), is not the beginning of the conversation with the "
                "answer; use a template whose generation prompt is what stands before every answer"
            )
        return whole[len(prompt) :]

    def _ending_of_turns(self) -> int | None:
        """The EOS that the template writes after an answer, if it writes one."""
        try:
            rendered = self._render(PROBE, answer_follows=False)
        except DataError as error:
            raise ModelError(f"model.chat_template: fails on a question and its answer: {error}") from error
        _, answer, rest = rendered.rpartition(PROBE[1]["content"])
        if not answer:
            raise ModelError(f"model.chat_template: does not write the answer into {rendered!r}; correct it")
        return self._cut_at_eos(rest)[1]

    def _cut_at_eos(self, rendered: str) -> tuple[str, int | None]:
        """The text before the last EOS, and that EOS; the whole text and None if there is none."""
        position, text = max((rendered.rfind(text), text) for text in self._eos_texts)
        return (rendered, None) if position < 0 else (rendered[:position], self._eos_texts[text])

    def _text_of(self, token: int) -> str:
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        if not text:
            raise ModelError(
                f"model.path: EOS id {token} is not in the tokenizer; correct generation_config.json"
            )
        return str(text)

    def _render(self, messages: Sequence[Message], answer_follows: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=answer_follows
                )
            )
        except (TemplateError, TypeError) as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from error

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _not_continuing(before: str, whole: str) -> ModelError:
    return ModelError(
        f"model.chat_template: a conversation that goes on ({whole[-200:]!r}) does not begin with what was "
        f"there when its last answer was sampled ({before[-80:]!r}): the template drops or rewrites earlier "
        "turns; for episodes of several turns use one that only appends"
    )
