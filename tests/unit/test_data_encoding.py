"""Examples to token arrays: limits, reports, and agreement of all stages."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.encoding import encode_pairs, encode_prompts, encode_sft
from rlhf_ray.data.formats import PreferenceExample, PromptExample, SFTExample
from rlhf_ray.errors import DataError
from rlhf_ray.types import Message
from tests.tiny import CHATML, tiny_tokenizer

END = 2
FORMATTER = ChatFormatter(tiny_tokenizer(), [END])


def conversation(question: str, answer: str) -> tuple[Message, ...]:
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


SHORT = conversation("Why?", "Because.")
NUM_PROMPT = len(FORMATTER.prompt_ids(SHORT[:1]))
NUM_ANSWER = len(FORMATTER.completion_ids("Because."))


def test_sft_rows_that_fit_are_whole() -> None:
    batch, skipped = encode_sft([SFTExample(4, SHORT), SFTExample(7, (), "The egg.")], FORMATTER, 64)
    assert batch.tokens[0].tolist() == FORMATTER.prompt_ids(SHORT[:1]) + FORMATTER.completion_ids("Because.")
    assert batch.is_target[0].tolist() == [False] * NUM_PROMPT + [True] * NUM_ANSWER
    assert batch.tokens[1].tolist() == FORMATTER.text_row("The egg.")[0]
    assert batch.tokens.values.dtype == np.dtype("int32")
    assert batch.is_target.values.dtype == np.dtype("bool")
    assert (len(skipped), list(skipped.truncated)) == (0, [])


def test_a_long_answer_is_cut_and_a_long_prompt_leaves_the_row_out() -> None:
    examples = [
        SFTExample(0, SHORT),
        SFTExample(1, conversation("Why?", "Because of many reasons. " * 9)),
        SFTExample(2, conversation("Why? " * 40, "Because.")),
    ]
    limit = NUM_PROMPT + NUM_ANSWER
    batch, skipped = encode_sft(examples, FORMATTER, limit)
    assert batch.tokens.lengths.tolist() == [limit, limit]
    assert [int(row.sum()) for row in batch.is_target] == [NUM_ANSWER, NUM_ANSWER]
    assert batch.tokens[1][-1] != END, "an answer that was cut does not end"
    assert dict(skipped.rows) == {"no target token fits into max_length": [2]}
    assert list(skipped.truncated) == [1]


def test_a_cut_row_keeps_no_tokens_after_its_last_target() -> None:
    turns = (*SHORT, *conversation("And then? " * 10, "Nothing."))
    whole = FORMATTER.sft_row(turns)[0]
    batch, skipped = encode_sft([SFTExample(0, turns)], FORMATTER, len(whole) - 20)
    assert batch.tokens[0].tolist() == whole[: NUM_PROMPT + NUM_ANSWER]
    assert batch.is_target[0][-1]
    assert list(skipped.truncated) == [0]


def test_one_token_of_room_for_the_answer_is_enough_and_none_is_too_little() -> None:
    batch, _ = encode_sft([SFTExample(0, SHORT)], FORMATTER, NUM_PROMPT + 1)
    assert batch.is_target[0].tolist() == [False] * NUM_PROMPT + [True]
    longest = NUM_PROMPT + NUM_ANSWER
    message = rf"max_length={NUM_PROMPT}: no row is left: .*the longest has {longest} tokens; raise"
    with pytest.raises(DataError, match=message):
        encode_sft([SFTExample(0, SHORT)], FORMATTER, NUM_PROMPT)


def pair(position: int, chosen: str, rejected: str, margin: float = 0.0) -> PreferenceExample:
    return PreferenceExample(position, SHORT[:1], chosen, rejected, margin, {})


def test_pairs_share_their_prompt_and_end_in_the_eos() -> None:
    batch, skipped = encode_pairs([pair(0, "Because.", "No.", 1.5)], FORMATTER, 64)
    prompt = FORMATTER.prompt_ids(SHORT[:1])
    assert batch.prompt_lengths.tolist() == [NUM_PROMPT]
    assert batch.chosen[0].tolist() == prompt + FORMATTER.completion_ids("Because.")
    assert batch.rejected[0].tolist() == prompt + FORMATTER.completion_ids("No.")
    assert batch.chosen[0][-1] == batch.rejected[0][-1] == END
    assert batch.margin.tolist() == [1.5]
    assert batch.soft_label.tolist() == [1.0]
    assert len(skipped) == 0


def test_a_chosen_answer_is_the_same_tokens_for_sft_and_for_the_reward_model() -> None:
    sft, _ = encode_sft([SFTExample(0, SHORT)], FORMATTER, 64)
    pairs, _ = encode_pairs([pair(0, "Because.", "No.")], FORMATTER, 64)
    prompts, _ = encode_prompts([PromptExample(0, SHORT[:1], {})], FORMATTER, 64)
    assert sft.tokens[0].tolist() == pairs.chosen[0].tolist()
    assert pairs.chosen[0][:NUM_PROMPT].tolist() == prompts.token_ids[0].tolist()


def test_pairs_that_are_too_long_on_either_side_are_left_out() -> None:
    long = "Because of many reasons. " * 9
    examples = [pair(0, "Because.", long), pair(5, "Because.", "No."), pair(9, long, "No.")]
    batch, skipped = encode_pairs(examples, FORMATTER, NUM_PROMPT + NUM_ANSWER)
    assert len(batch) == 1
    assert dict(skipped.rows) == {"prompt and answer are longer than max_length": [0, 9]}


def test_prompts_keep_ids_messages_and_columns_of_what_fits() -> None:
    examples = [
        PromptExample(3, SHORT[:1], {"topic": "reasons"}),
        PromptExample(8, conversation("Why? " * 40, "")[:1], {"topic": "long"}),
        PromptExample(11, conversation("Who?", "")[:1], {"topic": "people"}),
    ]
    prompts, skipped = encode_prompts(examples, FORMATTER, NUM_PROMPT)
    assert prompts.ids.tolist() == [3, 11]
    assert prompts.messages[1] == ({"role": "user", "content": "Who?"},)
    assert prompts.columns == ({"topic": "reasons"}, {"topic": "people"})
    assert prompts.token_ids[0].tolist() == FORMATTER.prompt_ids(SHORT[:1])
    assert dict(skipped.rows) == {"the prompt is longer than max_prompt_length": [8]}


def test_no_prompt_left_names_the_longest_and_the_limit() -> None:
    message = rf"max_prompt_length=5: no row is left: .*the longest has {NUM_PROMPT} tokens"
    with pytest.raises(DataError, match=message):
        encode_prompts([PromptExample(0, SHORT[:1], {})], FORMATTER, 5)


def test_rows_that_the_template_refuses_are_skipped_with_its_words() -> None:
    tokenizer = tiny_tokenizer()
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    tokenizer.chat_template = refuse + CHATML
    formatter = ChatFormatter(tokenizer, [END])
    system: Message = {"role": "system", "content": "Be brief."}
    reason = {"the chat template refuses the conversation: no system turns": [1]}
    _, skipped = encode_sft([SFTExample(0, SHORT), SFTExample(1, (system, *SHORT))], formatter, 64)
    assert dict(skipped.rows) == reason
    prompts = [PromptExample(0, SHORT[:1], {}), PromptExample(1, (system, SHORT[0]), {})]
    assert dict(encode_prompts(prompts, formatter, 64)[1].rows) == reason
    pairs = [pair(0, "a", "b"), PreferenceExample(1, (system, SHORT[0]), "a", "b", 0.0, {})]
    assert dict(encode_pairs(pairs, formatter, 64)[1].rows) == reason
