"""Every format of the field becomes the same typed examples; what cannot be used is counted, not lost."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from rlhf_ray.config.schema import DatasetSection
from rlhf_ray.data.files import Row
from rlhf_ray.data.formats import (
    LabelledExample,
    PreferenceExample,
    Purpose,
    SFTExample,
    check_columns,
    has_labels,
    labelled_examples,
    preference_examples,
    prompt_examples,
    sft_examples,
)
from rlhf_ray.data.loading import Table, load_rows
from rlhf_ray.data.skipped import Skipped
from rlhf_ray.data.split import split_key
from rlhf_ray.errors import DataError
from rlhf_ray.types import Message

HH_HARMLESS = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless.jsonl.gz"


def table(*rows: Mapping[str, object]) -> Table:
    return Table([dict(row) for row in rows], list(range(len(rows))), "rows.jsonl", "0")


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


SYSTEM: Message = {"role": "system", "content": "Be brief."}
QUESTION, ANSWER = user("Why?"), assistant("Because.")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, ANSWER]},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"prompt": "Why?", "completion": "Because."},
        {"prompt": "Why?", "completion": "Because.", "label": True},
        {"prompt": "Why?", "completion": "Because.", "label": "1"},
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "completion": "Because."},
        {"text": "\n\nHuman: Why?\n\nAssistant: Because."},
        {"messages": "\n\nHuman: Why?\n\nAssistant: Because."},
        {"messages": ({**QUESTION, "name": None}, ANSWER)},
    ],
)
def test_sft_formats_give_one_conversation(row: Row) -> None:
    examples, skipped = sft_examples(table(row))
    assert examples == [SFTExample(0, (QUESTION, ANSWER))]
    assert len(skipped) == 0


def test_plain_text_stays_text() -> None:
    examples, _ = sft_examples(table({"text": "Once upon a time\n\nAssistant: no transcript"}))
    assert examples == [SFTExample(0, (), "Once upon a time\n\nAssistant: no transcript")]


def test_disapproved_answers_are_not_imitated() -> None:
    labels = (1, 0, "maybe")
    examples, skipped = sft_examples(
        table(*({"prompt": "Why?", "completion": "Because.", "label": label} for label in labels))
    )
    assert [example.id for example in examples] == [0]
    assert skipped.counts == {"'label' is false": 1, "'label' is neither true nor false": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?"},
        {"prompt": [QUESTION]},
        {"prompt": "\n\nHuman: Why?\n\nAssistant:"},
        {"prompt": "\n\nHuman: Why?"},
        {"messages": [QUESTION, ANSWER]},
        {"messages": [QUESTION]},
    ],
)
def test_prompt_formats_give_one_prompt(row: Row) -> None:
    examples, _ = prompt_examples(table({**row, "topic": "reasons", "answer": 7}))
    assert [(e.id, e.messages) for e in examples] == [(0, (QUESTION,))]
    assert examples[0].columns == {"topic": "reasons", "answer": 7}


def test_only_the_last_answer_is_dropped_from_messages() -> None:
    turns = [SYSTEM, QUESTION, ANSWER, user("Really?"), assistant("Yes.")]
    examples, _ = prompt_examples(table({"messages": turns}))
    assert examples[0].messages == tuple(turns[:4])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [assistant("No.")]},
        {"prompt": "Why?", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, assistant("No.")]},
        {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, assistant("No.")]},
        {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
        {
            "prompt": "\n\nHuman: Why?\n\nAssistant:",
            "chosen": "\n\nHuman: Why?\n\nAssistant: Because.",
            "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
        },
        {"prompt": None, "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, assistant("No.")]},
    ],
)
def test_preference_formats_give_one_pair(row: Row) -> None:
    examples, _ = preference_examples(table({**row, "margin": 1.5, "annotator": "human"}))
    assert examples == [PreferenceExample(0, (QUESTION,), "Because.", "No.", 1.5, {"annotator": "human"})]


def test_the_prompt_of_a_pair_ends_before_the_answers_part() -> None:
    shared = [SYSTEM, QUESTION, ANSWER, user("Really?")]
    row = {"chosen": [*shared, assistant("Yes.")], "rejected": [*shared, assistant("No.")]}
    examples, _ = preference_examples(table(row, {**row, "prompt": "Really?"}))
    parts = [(e.messages, e.chosen, e.rejected, e.margin) for e in examples]
    assert parts == [(tuple(shared), "Yes.", "No.", 0.0)] * 2


GOOD: Row = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chosen": None}, "'chosen' is missing"),
        ({"rejected": "  "}, "'rejected' has empty text"),
        ({"rejected": " Because. "}, "'chosen' and 'rejected' are the same"),
        ({"rejected": 3}, "'rejected' is neither text nor a list of turns"),
        ({"prompt": None}, "there is no 'prompt', and 'chosen' and 'rejected' are not both conversations"),
        (
            {"prompt": None, "chosen": [user("a"), ANSWER], "rejected": [user("b"), ANSWER]},
            "'chosen' and 'rejected' do not share a prompt",
        ),
        (
            {"prompt": None, "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]},
            "'chosen' and 'rejected' are the same",
        ),
        (
            {"prompt": None, "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER, QUESTION, ANSWER]},
            "'chosen' and 'rejected' are not one assistant turn each after the turns that they share",
        ),
        (
            {
                "prompt": None,
                "chosen": [QUESTION, ANSWER, assistant("Yes.")],
                "rejected": [QUESTION, ANSWER, assistant("No.")],
            },
            "'chosen' and 'rejected' are not one assistant turn each after the turns that they share",
        ),
        (
            {
                "prompt": None,
                "chosen": [SYSTEM, QUESTION, ANSWER],
                "rejected": [SYSTEM, user("Who?"), ANSWER],
            },
            "'chosen' and 'rejected' do not share a prompt",
        ),
        (
            {"prompt": "Who?", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, assistant("No.")]},
            "'prompt' is not the conversation of 'chosen' and 'rejected'",
        ),
        ({"margin": "much"}, "'margin' is not a finite number"),
        ({"margin": 1e39}, "'margin' is not a finite number"),
        ({"margin": True}, "'margin' is not a finite number"),
        ({"soft_label": 0.49}, "'soft_label' is not a number from 0.5 to 1"),
        ({"soft_label": 1.01}, "'soft_label' is not a number from 0.5 to 1"),
        ({"soft_label": float("nan")}, "'soft_label' is not a number from 0.5 to 1"),
        ({"soft_label": "sure"}, "'soft_label' is not a number from 0.5 to 1"),
        ({"soft_label": True}, "'soft_label' is not a number from 0.5 to 1"),
        ({"prompt": [QUESTION, ANSWER]}, "'prompt' does not end in a user turn"),
        ({"prompt": "Why\ud800"}, "'prompt' is not valid Unicode"),
        ({"prompt": []}, "'prompt' is empty"),
        ({"prompt": ["Why?"]}, "'prompt' has a turn that is not an object with role and content"),
        ({"prompt": [{"from": "human", "value": "Why?"}]}, "'prompt' has a turn whose role is not one of"),
        ({"prompt": [{"role": "user"}]}, "'prompt' has a turn whose content is not text"),
        ({"prompt": [ANSWER, QUESTION]}, "'prompt' does not begin with a user turn"),
        ({"prompt": [QUESTION, SYSTEM]}, "'prompt' has a system turn after the first turn"),
        ({"prompt": "\n\nHuman: a\n\nAssistant:\n\nHuman: b"}, "'prompt' has an empty turn"),
        ({"chosen": [QUESTION]}, "'chosen' is not one answer of the assistant"),
    ],
)
def test_an_unusable_row_is_skipped_with_its_reason(changes: Row, reason: str) -> None:
    examples, skipped = preference_examples(table(GOOD, GOOD | changes, GOOD))
    assert [example.id for example in examples] == [0, 2]
    ((found, positions),) = skipped.rows.items()
    assert found.startswith(reason)
    assert positions == [1]


def test_soft_labels_are_read_and_are_certain_by_default() -> None:
    labels = ({"soft_label": 0.75}, {"soft_label": "0.5"}, {"soft_label": None}, {})
    examples, _ = preference_examples(table(*({**GOOD, **more} for more in labels)))
    assert [example.soft_label for example in examples] == [0.75, 0.5, 1.0, 1.0]
    assert "soft_label" not in examples[0].columns


def test_labelled_answers() -> None:
    rows = table(
        {"prompt": "Why?", "completion": "Because.", "label": True},
        {"prompt": [QUESTION], "completion": [ANSWER], "label": "0"},
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "completion": "Because.", "label": 1},
        {"prompt": "Why?", "completion": "Because.", "label": 0.5},
        {"prompt": "Why?", "completion": "Because."},
        {"prompt": "Why?", "completion": " ", "label": True},
    )
    assert has_labels(rows)
    examples, skipped = labelled_examples(rows)
    assert examples == [
        LabelledExample(0, (QUESTION,), "Because.", True),
        LabelledExample(1, (QUESTION,), "Because.", False),
        LabelledExample(2, (QUESTION,), "Because.", True),
    ]
    assert dict(skipped.rows) == {
        "'label' is neither true nor false": [3, 4],
        "'completion' has empty text": [5],
    }
    assert not has_labels(table(GOOD))


@pytest.mark.parametrize("messages", [[QUESTION], "just text", [user("a"), assistant(" ")]])
def test_a_demonstration_needs_an_answer(messages: object) -> None:
    with pytest.raises(DataError, match=r"none of its rows can be used: 1 rows skipped; 1 'messages'"):
        sft_examples(table({"messages": messages}))


def test_the_report_counts_reasons_and_names_rows_as_people_count_them() -> None:
    prompts = [""] * 5 + [None, "Why?"]
    _, skipped = prompt_examples(table(*({"prompt": prompt} for prompt in prompts)))
    assert skipped.counts == {"'prompt' has empty text": 5, "'prompt' is missing": 1}
    assert str(skipped) == (
        "6 rows skipped; 5 'prompt' has empty text (rows 1, 2, 3, …); 1 'prompt' is missing (row 6)"
    )
    both = skipped + Skipped({"'prompt' is missing": [8], "too long": [9]}, truncated=[2])
    assert both.counts == {"'prompt' has empty text": 5, "'prompt' is missing": 2, "too long": 1}
    assert len(both) == 8
    assert str(both).endswith("1 too long (row 10); 1 rows cut at the length limit (row 3)")


@pytest.mark.parametrize(
    ("purpose", "wanted"),
    [
        ("sft", "sft needs 'messages', or 'prompt' and 'completion', or 'text'"),
        ("prompts", "prompts needs 'prompt', or 'messages'"),
        ("pairs", "pairs needs 'chosen' and 'rejected'"),
        (
            "labelled answers",
            "labelled answers needs 'prompt' and 'completion' and 'label', or 'chosen' and 'rejected'",
        ),
    ],
)
def test_missing_columns_are_named(tmp_path: Path, purpose: Purpose, wanted: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Why?", "chosen": "Because."}\n')
    (mistake,) = check_columns(DatasetSection(path=str(path)), purpose)
    assert f"has the columns 'question', 'chosen'; {wanted}" in mistake
    read = {
        "sft": sft_examples,
        "prompts": prompt_examples,
        "pairs": preference_examples,
        "labelled answers": has_labels,
    }[purpose]
    with pytest.raises(DataError) as caught:
        read(load_rows(DatasetSection(path=str(path)), seed=0))
    assert str(caught.value) == mistake


def test_a_check_passes_what_the_stage_reads_and_reports_what_it_cannot(tmp_path: Path) -> None:
    assert check_columns(DatasetSection(path="embedded:prompts"), "prompts") == []
    assert check_columns(DatasetSection(path="embedded:demonstrations", split="test"), "sft") == []
    assert check_columns(DatasetSection(path="somebody/something"), "pairs") == []
    (mistake,) = check_columns(DatasetSection(path=str(tmp_path / "none.jsonl")), "sft")
    assert "no such file" in mistake
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Why?", "completions": 3}\n')
    (mistake,) = check_columns(DatasetSection(path=str(path)), "prompts")
    assert "column 'completions' has the name of an argument of reward functions; rename it" in mistake


def test_the_embedded_datasets_are_usable_whole() -> None:
    for split in ("train", "test"):
        for name, read in (("prompts", prompt_examples), ("demonstrations", sft_examples)):
            rows = load_rows(DatasetSection(path=f"embedded:{name}", split=split), seed=0)
            examples, skipped = read(rows)
            assert (len(examples), len(skipped)) == (len(rows), 0)


@pytest.mark.skipif(not HH_HARMLESS.is_file(), reason="the human preferences are not part of the project")
def test_human_preference_pairs() -> None:
    examples, skipped = preference_examples(load_rows(DatasetSection(path=str(HH_HARMLESS)), seed=0))
    assert (len(examples), len(skipped)) == (1174, 0)
    with gzip.open(HH_HARMLESS, "rt", encoding="utf-8") as lines:
        for example, line in zip(examples, lines, strict=True):
            row = json.loads(line)
            # An independent way back: the transcript from the turns.
            names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
            prompt = "".join(names[turn["role"]] + turn["content"] for turn in example.messages)
            for side, answer in (("chosen", example.chosen), ("rejected", example.rejected)):
                written = f"{prompt}\n\nAssistant: {answer}"
                assert written.split() == row[side].split()
    # Some dialogues share their first turn only; the shorter answer wins slightly more often than not.
    assert len({split_key(e.messages, "first_turn") for e in examples}) < len(examples)
    shorter = Counter(len(e.chosen) < len(e.rejected) for e in examples)
    assert 0.5 < shorter[True] / len(examples) < 0.6
