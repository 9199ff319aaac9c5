"""One formatter: what SFT teaches begins with exactly what is sampled from and scored."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.errors import DataError, ModelError
from rlhf_ray.types import Message
from tests.tiny import CHATML, tiny_tokenizer

TEXT_END, START, END = 0, 1, 2

CONVERSATION: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How do I boil an egg?"},
    {"role": "assistant", "content": "Place it in boiling water."},
    {"role": "user", "content": "For how long?"},
    {"role": "assistant", "content": "Six minutes."},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def formatter(tokenizer: PreTrainedTokenizerFast) -> ChatFormatter:
    return ChatFormatter(tokenizer, [END])


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def answers_of(tokenizer: PreTrainedTokenizerFast, ids: list[int], is_target: list[bool]) -> list[str]:
    """Each run of targets, decoded."""
    runs: list[list[int]] = []
    for position, (token, target) in enumerate(zip(ids, is_target, strict=True)):
        if target and (position == 0 or not is_target[position - 1]):
            runs.append([])
        if target:
            runs[-1].append(token)
    return [str(tokenizer.decode(run)) for run in runs]


def test_a_prompt_is_the_rendered_conversation_with_the_header_of_the_answer(
    tokenizer: PreTrainedTokenizerFast, formatter: ChatFormatter
) -> None:
    ids = formatter.prompt_ids(CONVERSATION[:2])
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow do I boil an egg?<|im_end|>\n"
    assert tokenizer.decode(ids) == expected + "<|im_start|>assistant\n"
    assert ids.count(START) == 3


def test_targets_are_the_answers_and_their_eos(
    tokenizer: PreTrainedTokenizerFast, formatter: ChatFormatter
) -> None:
    ids, is_target = formatter.sft_row(CONVERSATION)
    assert answers_of(tokenizer, ids, is_target) == [
        "Place it in boiling water.<|im_end|>",
        "Six minutes.<|im_end|>",
    ]
    # pad is eos here, and the EOS of both answers still carries loss, while those of the other turns do not.
    assert tokenizer.pad_token_id == END
    on_eos = [target for token, target in zip(ids, is_target, strict=True) if token == END]
    assert on_eos == [False, False, True, False, True]
    assert ids[-1] == END, "nothing follows the last EOS"


def test_every_answer_follows_exactly_its_prompt(formatter: ChatFormatter) -> None:
    ids, is_target = formatter.sft_row(CONVERSATION)
    for turn in (2, 4):
        prompt = formatter.prompt_ids(CONVERSATION[:turn])
        answer = formatter.completion_ids(CONVERSATION[turn]["content"])
        assert ids[: len(prompt) + len(answer)] == prompt + answer
        assert is_target[len(prompt) : len(prompt) + len(answer)] == [True] * len(answer)
        assert not is_target[len(prompt) - 1]


def test_messages_after_the_last_answer_are_left_out(formatter: ChatFormatter) -> None:
    more = [*CONVERSATION, {"role": "user", "content": "Thank you"}]
    assert formatter.sft_row(more) == formatter.sft_row(CONVERSATION)
    with pytest.raises(DataError, match="no assistant turn"):
        formatter.sft_row(CONVERSATION[:2])


def test_an_earlier_answer_that_merges_with_its_header_is_context_only() -> None:
    # Two line breaks become one token, so header and answer together are other tokens than one after the
    # other.
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["\n\n"])
    formatter = ChatFormatter(tokenizer, [END])
    turns = [
        CONVERSATION[1],
        {"role": "assistant", "content": "\nPlace it in water."},
        CONVERSATION[3],
        CONVERSATION[4],
    ]
    ids, is_target = formatter.sft_row(turns)
    assert answers_of(tokenizer, ids, is_target) == ["Six minutes.<|im_end|>"]
    prompt = formatter.prompt_ids(turns[:3])
    assert ids == prompt + formatter.completion_ids("Six minutes.")
    assert len(is_target) == len(ids)


def test_the_eos_is_appended_if_absent_and_never_doubled(formatter: ChatFormatter) -> None:
    ids = formatter.completion_ids("Six minutes.")
    assert ids[-1] == END and ids.count(END) == 1
    assert formatter.completion_ids("Six minutes.<|im_end|>") == ids
    assert formatter.completion_ids("") == [END]


@pytest.mark.parametrize(("ending", "eos"), [("<|im_end|>", END), ("<|endoftext|>", TEXT_END)])
def test_of_several_eos_ids_the_template_ends_turns_with_its_own(ending: str, eos: int) -> None:
    tokenizer = with_template(CHATML.replace("<|im_end|>", ending))
    formatter = ChatFormatter(tokenizer, [TEXT_END, END])
    assert formatter.eos_token_ids == {TEXT_END, END}
    assert formatter.eos_token_id == eos
    assert formatter.completion_ids("Yes.")[-1] == eos
    for text in ("<|im_end|>", "<|endoftext|>"):
        assert formatter.completion_ids("Yes." + text)[:-1] == formatter.completion_ids("Yes.")[:-1]
        assert len(formatter.completion_ids("Yes." + text)) == len(formatter.completion_ids("Yes."))
    ids, is_target = formatter.sft_row(CONVERSATION)
    assert answers_of(tokenizer, ids, is_target)[1] == "Six minutes." + ending


def test_a_template_without_eos_still_teaches_to_stop() -> None:
    tokenizer = with_template(
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    ids, is_target = ChatFormatter(tokenizer, [END]).sft_row(CONVERSATION)
    assert str(tokenizer.decode(ids)).endswith("assistant: Six minutes.\n<|im_end|>")
    # Inference never shows an EOS between turns, so the earlier answer cannot stand in the same row with its
    # own.
    assert answers_of(tokenizer, ids, is_target) == ["Six minutes.\n<|im_end|>"]


def test_one_bos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", TEXT_END)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    assert tokenizer("Yes.")["input_ids"][0] == TEXT_END, "this tokenizer adds a BOS"
    formatter = ChatFormatter(tokenizer, [END])
    assert formatter.prompt_ids(CONVERSATION[:2]).count(TEXT_END) == 1
    assert formatter.sft_row(CONVERSATION)[0].count(TEXT_END) == 1
    assert formatter.completion_ids("Yes.").count(TEXT_END) == 0
    for text in ("Yes.", "<|endoftext|>Yes."):
        ids, _ = formatter.text_row(text)
        assert ids.count(TEXT_END) == 1 and ids[0] == TEXT_END


def test_plain_text_is_a_target_but_for_its_first_token(
    tokenizer: PreTrainedTokenizerFast, formatter: ChatFormatter
) -> None:
    ids, is_target = formatter.text_row("The egg is cold.")
    assert tokenizer.decode(ids) == "The egg is cold.<|im_end|>"
    assert is_target == [False] + [True] * (len(ids) - 1)
    assert formatter.text_row("The egg is cold.<|im_end|>") == (ids, is_target)


def test_a_template_that_trims_answers_teaches_the_trimmed_ones() -> None:
    tokenizer = with_template(CHATML.replace("message['content']", "message['content'] | trim"))
    formatter = ChatFormatter(tokenizer, [END])
    padded = [*CONVERSATION[:4], {"role": "assistant", "content": "  Six minutes.\n"}]
    assert formatter.sft_row(padded) == formatter.sft_row(CONVERSATION)


def test_a_template_that_rewrites_earlier_answers_teaches_the_last_one() -> None:
    template = CHATML.replace(
        "message['content']", "(message['content'] if loop.last or message['role'] == 'user' else 'cut')"
    )
    tokenizer = with_template(template)
    formatter = ChatFormatter(tokenizer, [END])
    ids, is_target = formatter.sft_row(CONVERSATION[1:])
    assert answers_of(tokenizer, ids, is_target) == ["Six minutes.<|im_end|>"]
    assert ids[: is_target.index(True)] == formatter.prompt_ids(CONVERSATION[1:4])


def test_a_tokenizer_without_template_is_refused_with_the_remedy() -> None:
    with pytest.raises(ModelError, match=r"model\.chat_template: .*set model\.chat_template to a Jinja file"):
        ChatFormatter(with_template(None), [END])


def test_a_model_without_eos_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match="names no EOS token"):
        ChatFormatter(tokenizer, [])
    with pytest.raises(ModelError, match="EOS id 999 is not in the tokenizer"):
        ChatFormatter(tokenizer, [999])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in messages %}", "fails on a question"),
        ("{{ messages[0]['content'] + none }}", "fails on a question"),
        ("{{ undefined_name.part }}", "fails on a question"),
        ("constant", "does not write the answer"),
    ],
)
def test_a_template_that_cannot_work_is_refused_at_once(template: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ChatFormatter(with_template(template), [END])


def test_a_generation_prompt_that_no_answer_follows_is_refused_for_sft_only() -> None:
    tokenizer = with_template(CHATML.replace("assistant\n", "assistant\n<think>\n"))
    formatter = ChatFormatter(tokenizer, [END])
    assert str(tokenizer.decode(formatter.prompt_ids(CONVERSATION[:2]))).endswith("assistant\n<think>\n")
    with pytest.raises(ModelError, match="not prefix-preserving"):
        formatter.sft_row(CONVERSATION)


def test_a_conversation_that_the_template_refuses_is_the_rows_fault() -> None:
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    formatter = ChatFormatter(with_template(refuse + CHATML), [END])
    assert formatter.prompt_ids(CONVERSATION[1:2])
    with pytest.raises(DataError, match="refuses the conversation: no system turns"):
        formatter.prompt_ids(CONVERSATION[:2])


content = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(content, min_size=2, max_size=8))
def test_any_conversation_is_its_rendering_and_every_target_follows_its_prompt(turns: list[str]) -> None:
    formatter = ChatFormatter(TOKENIZER, [END])
    roles = ("user", "assistant")
    messages = [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(turns)]
    answered = range(1, len(messages), 2)
    ids, is_target = formatter.sft_row(messages)
    shown = messages[: answered[-1] + 1]
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in shown)
    assert TOKENIZER.decode(ids) == whole.removesuffix("\n")
    learned: dict[int, int] = {}
    for turn in answered:
        prompt = formatter.prompt_ids(messages[:turn])
        answer = formatter.completion_ids(messages[turn]["content"])
        if ids[: len(prompt) + len(answer)] == prompt + answer:
            learned |= dict.fromkeys(range(len(prompt), len(prompt) + len(answer)), turn)
    assert learned[len(ids) - 1] == answered[-1], "the last answer is always learned"
    targets = [position for position, target in enumerate(is_target) if target]
    assert set(targets) <= set(learned), "a target that does not follow exactly its prompt"
    if not any(text[0].isspace() for text in turns):
        assert set(learned.values()) == set(answered)
        assert targets == sorted(learned)
    assert len(is_target) == len(ids)


TOKENIZER = tiny_tokenizer()
