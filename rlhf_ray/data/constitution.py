"""A constitution: principles in a file, and the conversations in which a model applies them."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from rlhf_ray.config.document import Document, KeyPath, nearest
from rlhf_ray.config.reading import read_limited, read_yaml
from rlhf_ray.config.schema import EMBEDDED_CONSTITUTION, Section
from rlhf_ray.data.conversations import Turns
from rlhf_ray.errors import ConfigError
from rlhf_ray.types import Message

Sentence = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
SPEAKERS = {"user": "Person", "assistant": "Assistant", "system": "Instructions"}
OPTIONS = (" (A)", " (B)")
ANSWER_LEAD = "The better answer is"
"""How the feedback model's reply begins; an option follows."""


class Principle(Section):
    """
    critique, revision: said to a model about its own last answer. choice: asked about two answers.
    source: where the idea comes from.
    """

    id: Sentence
    critique: Sentence
    revision: Sentence
    choice: Sentence
    source: Sentence


class Example(Section):
    """A critique and a revision as they should be, by the principle of that id."""

    principle: Sentence
    prompt: Sentence
    answer: Sentence
    critique: Sentence
    revision: Sentence


class _Content(Section):
    principles: tuple[Principle, ...] = Field(min_length=1)
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Constitution:
    """
    Fields:
        source: as the configuration names it. fingerprint: SHA-256 of the file's text.
    """

    principles: tuple[Principle, ...]
    examples: tuple[Example, ...]
    source: str
    fingerprint: str

    def __getitem__(self, id: str) -> Principle:
        return next(principle for principle in self.principles if principle.id == id)

    def critique_messages(self, principle: Principle, prompt: Sequence[Message], answer: str) -> Turns:
        """The conversation in which the model criticises its answer, after the examples."""
        shown = [turn for example in self.examples for turn in self._example_turns(example)]
        return (*shown, *prompt, _assistant(answer), _user(principle.critique))

    def revision_messages(
        self, principle: Principle, prompt: Sequence[Message], answer: str, critique: str
    ) -> Turns:
        """The same conversation, in which the model has criticised its answer and is to revise it."""
        so_far = self.critique_messages(principle, prompt, answer)
        return (*so_far, _assistant(critique), _user(principle.revision))

    def _example_turns(self, example: Example) -> Turns:
        principle = self[example.principle]
        return (
            _user(example.prompt),
            _assistant(example.answer),
            _user(principle.critique),
            _assistant(example.critique),
            _user(principle.revision),
            _assistant(example.revision),
        )


def choice_messages(principle: Principle, prompt: Sequence[Message], answers: tuple[str, str]) -> Turns:
    """The question which of two answers is better; `ANSWER_LEAD` and one of `OPTIONS` are the reply."""
    spoken = "\n".join(f"{SPEAKERS[turn['role']]}: {turn['content']}" for turn in prompt)
    first, second = (answer.strip() for answer in answers)
    return (
        _user(
            f"This is a conversation between a person and an assistant.\n\n{spoken}\n\n"
            f"Here are two answers that the assistant could give.\n\n(A) {first}\n\n(B) {second}\n\n"
            f"{principle.choice} Reply with (A) or (B)."
        ),
    )


def load_constitution(path: str) -> Constitution:
    """
    Args:
        path: a YAML file, or `embedded:constitution`.

    Raises:
        ConfigError: every mistake, as `file:line: key.path=value: what is wrong; remedy`.
    """
    text = _read(path)
    document = Document()
    read_yaml(text, path, document)
    content = _validated(document)
    if content is not None:
        _check_ids(content, document)
    if content is None or document.mistakes:
        raise ConfigError(*document.mistakes)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return Constitution(content.principles, content.examples, path, fingerprint)


def _read(path: str) -> str:
    if path.startswith("embedded:") and path != EMBEDDED_CONSTITUTION:
        raise ConfigError(f"{path}: no such embedded constitution; use {EMBEDDED_CONSTITUTION}")
    if path == EMBEDDED_CONSTITUTION:
        resource = importlib.resources.files("rlhf_ray.data") / "embedded" / "constitution.yaml"
        return resource.read_text(encoding="utf-8")
    try:
        return read_limited(Path(path).expanduser())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name a YAML file, or {EMBEDDED_CONSTITUTION}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text in UTF-8; convert it") from error
    except (OSError, ValueError, RuntimeError) as error:  # a folder, a NUL in the name, an unknown ~user
        raise ConfigError(f"{path}: cannot be read ({error}); name a YAML file") from error


def _validated(document: Document) -> _Content | None:
    try:
        return _Content.model_validate_json(json.dumps(document.tree), strict=True)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            path: KeyPath = tuple(detail["loc"])
            # Entries that are wrong do not count as entries.
            if detail["type"] != "too_short" or not document.value(path):
                document.add(path, _complaint(path, detail))
    return None


def _complaint(path: KeyPath, detail: ErrorDetails) -> str:
    known: dict[str, type[Section]] = {"principles": Principle, "examples": Example}
    is_inside = len(path) > 1 and path[0] in known
    match detail["type"]:
        case "extra_forbidden":
            keys = list((known[str(path[0])] if is_inside else _Content).model_fields)
            return "unknown key" + (nearest(str(path[-1]), keys) or f"; known here: {', '.join(keys)}")
        case "missing" | "too_short":
            return "missing; give a list of principles" if not is_inside else "missing; give a sentence"
        case "string_too_short":
            return "empty; give a sentence"
        case "string_type":
            return "must be text; put it in quotes"
        case "tuple_type":
            return "must be a list, each entry with " + ", ".join(known[str(path[0])].model_fields)
    return f"must be a section with {', '.join(known[str(path[0])].model_fields)}"


def _check_ids(content: _Content, document: Document) -> None:
    ids = [principle.id for principle in content.principles]
    for index, id in enumerate(ids):
        if id in ids[:index]:
            document.add(("principles", index, "id"), "given to two principles; rename one")
    for index, example in enumerate(content.examples):
        if example.principle not in ids:
            hint = nearest(example.principle, ids) or f"; there are {', '.join(ids)}"
            document.add(("examples", index, "principle"), f"no principle has that id{hint}")


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
