"""Constitutions: what a file must hold, and the conversations that are made of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from rlhf_ray.config.schema import DatasetSection
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.constitution import (
    ANSWER_LEAD,
    OPTIONS,
    Constitution,
    choice_messages,
    load_constitution,
)
from rlhf_ray.data.loading import load_rows
from rlhf_ray.errors import ConfigError
from tests.tiny import tiny_tokenizer

KIND = """\
principles:
  - id: kind
    critique: What was unkind?
    revision: Say it kindly.
    choice: Which is kinder?
    source: a grandmother
"""
EXAMPLE = """\
examples:
  - {principle: kind, prompt: Hi, answer: Go., critique: Rude., revision: Hello.}
"""
PROMPT = ({"role": "user", "content": "Who are you?"},)


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture
def kind(tmp_path: Path) -> Constitution:
    return load_constitution(written(tmp_path, KIND + EXAMPLE))


def rendered(messages: tuple[dict[str, str], ...]) -> str:
    """What the model sees: the token ids as text, special tokens and all."""
    formatter = ChatFormatter(tiny_tokenizer(), (2,))
    return tiny_tokenizer().decode(formatter.prompt_ids(messages), skip_special_tokens=False)


def turns(*texts: str) -> str:
    roles = ("user", "assistant") * len(texts)
    spoken = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in zip(roles, texts, strict=False)]
    return "".join(spoken) + "<|im_start|>assistant\n"


def test_critique_request_as_the_model_sees_it(kind: Constitution) -> None:
    found = rendered(kind.critique_messages(kind["kind"], PROMPT, "None of your business."))
    assert found == turns(
        "Hi", "Go.", "What was unkind?", "Rude.", "Say it kindly.", "Hello.",
        "Who are you?", "None of your business.", "What was unkind?",
    )  # fmt: skip


def test_revision_request_goes_on_from_the_critique(tmp_path: Path) -> None:
    plain = load_constitution(written(tmp_path, KIND))
    found = rendered(plain.revision_messages(plain["kind"], PROMPT, "No.", "It is curt."))
    assert found == turns("Who are you?", "No.", "What was unkind?", "It is curt.", "Say it kindly.")


def test_choice_as_the_feedback_model_sees_it(kind: Constitution) -> None:
    prompt = (*PROMPT, {"role": "assistant", "content": "Guess."}, {"role": "user", "content": "Bob?"})
    found = rendered(choice_messages(kind["kind"], prompt, (" Yes.\n", "Go away.")))
    assert found == turns(
        "This is a conversation between a person and an assistant.\n\n"
        "Person: Who are you?\nAssistant: Guess.\nPerson: Bob?\n\n"
        "Here are two answers that the assistant could give.\n\n(A) Yes.\n\n(B) Go away.\n\n"
        "Which is kinder? Reply with (A) or (B)."
    )


def test_reply_is_encoded_as_it_would_be_in_one_piece() -> None:
    formatter = ChatFormatter(tiny_tokenizer(), (2,))
    for option in OPTIONS:
        apart = formatter.text_ids(ANSWER_LEAD) + formatter.text_ids(option)
        assert apart == formatter.text_ids(ANSWER_LEAD + option)
    first, second = map(formatter.text_ids, OPTIONS)
    assert len(first) == len(second) and first != second


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["own.yaml: principles: missing; give a list of principles"]),
        ("principles: []\n", ["own.yaml:1: principles=[]: missing; give a list of principles"]),
        (
            "principles: be nice\n",
            [
                "own.yaml:1: principles=be nice: must be a list, each entry with id, critique, revision, "
                "choice, source"
            ],
        ),
        (
            KIND.replace("critique:", "critque:") + "exampels: []\n",
            [
                "own.yaml:2: principles.0.critique: missing; give a sentence",
                "own.yaml:3: principles.0.critque=What was unkind?: unknown key; did you mean critique?",
                "own.yaml:7: exampels=[]: unknown key; did you mean examples?",
            ],
        ),
        (
            KIND.replace("What was unkind?", "3").replace("Say it kindly.", '" "'),
            [
                "own.yaml:3: principles.0.critique=3: must be text; put it in quotes",
                'own.yaml:4: principles.0.revision=" ": empty; give a sentence',
            ],
        ),
        (
            "principles: [nice]\n",
            [
                "own.yaml:1: principles.0=nice: must be a section with id, critique, revision, choice, source"
            ],
        ),
        (
            KIND + KIND.removeprefix("principles:\n"),
            ["own.yaml:7: principles.1.id=kind: given to two principles; rename one"],
        ),
        (
            KIND + EXAMPLE.replace("kind,", "kid,"),
            ["own.yaml:8: examples.0.principle=kid: no principle has that id; did you mean kind?"],
        ),
        (
            "principles: [\n",
            ["own.yaml:2: not valid YAML: expected the node content, but found '<stream end>'"],
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file(tmp_path: Path, text: str, said: list[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_constitution(path)
    assert [mistake.replace(path, "own.yaml") for mistake in caught.value.mistakes] == said


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("embedded:constitutoin", "no such embedded constitution; use embedded:constitution"),
        ("nowhere.yaml", "no such file; name a YAML file, or embedded:constitution"),
        (".", "cannot be read"),
        ("a\0b", "cannot be read"),
    ],
)
def test_what_is_no_file(path: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_constitution(path)


def test_the_fingerprint_follows_the_text(tmp_path: Path) -> None:
    first = load_constitution(written(tmp_path, KIND)).fingerprint
    assert load_constitution(written(tmp_path, KIND)).fingerprint == first
    assert load_constitution(written(tmp_path, KIND.replace("kinder", "nicer"))).fingerprint != first


def test_the_embedded_constitution() -> None:
    embedded = load_constitution("embedded:constitution")
    ids = [principle.id for principle in embedded.principles]
    assert len(set(ids)) == len(ids) == 11
    assert all(principle.choice.endswith("?") for principle in embedded.principles)
    assert embedded.examples


def test_every_red_team_question_has_its_harmless_twin_in_the_same_split() -> None:
    splits = [
        load_rows(DatasetSection(path="embedded:red-team", split=split), seed=0).rows
        for split in ("train", "test")
    ]
    assert [len(rows) for rows in splits] == [96, 24]
    for rows in splits:
        kinds: dict[object, list[object]] = {}
        for row in rows:
            kinds.setdefault((row["twin"], row["topic"]), []).append(row["kind"])
        assert all(sorted(map(str, pair)) == ["benign", "red_team"] for pair in kinds.values())
    texts = Counter(json.dumps(row["prompt"]) for rows in splits for row in rows)
    assert set(texts.values()) == {1}
