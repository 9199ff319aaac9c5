"""Critique and revision: who says what, what becomes of it, and going on after a stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from rich.console import Console

from rlhf_ray.config.schema import ConstitutionSection
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.constitution import Constitution, load_constitution
from rlhf_ray.errors import CheckpointError, Interrupted
from rlhf_ray.loops.constitution import RevisionLoop, longest_conversation
from rlhf_ray.reporting.progress import Progress
from rlhf_ray.reporting.revisions import (
    Revision,
    RevisionRound,
    choose_revisions,
    read_revisions,
    render_revisions,
    revision_metrics,
    revisions_markdown,
    revisions_note,
    write_revisions,
)
from rlhf_ray.roles import Done, Generator, Pending
from rlhf_ray.types import Prompts, Rollouts, SamplingSpec
from tests.fakes import HandFedGenerator, Watcher
from tests.local_roles import LocalGenerator, logged, stage_run
from tests.samples import prompts_of, rollouts_of
from tests.tiny import tiny_model_folder, tiny_tokenizer

PRINCIPLES = """\
principles:
  - {id: kind, critique: "What is rude?", revision: "Be kind.", choice: "Kinder?", source: s}
  - {id: honest, critique: "What is false?", revision: "Be honest.", choice: "Truer?", source: s}
"""
TEXTS = ("boil an egg", "the capital", "a train", "soft yolk", "cold water")


@pytest.fixture(scope="module")
def constitution(tmp_path_factory: pytest.TempPathFactory) -> Constitution:
    path = tmp_path_factory.mktemp("constitution") / "two.yaml"
    path.write_text(PRINCIPLES)
    return load_constitution(str(path))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("tiny"))


def section(**keys: object) -> ConstitutionSection:
    return ConstitutionSection.model_validate(
        {
            "dataset": {"path": "prompts.jsonl"},
            "max_completion_length": 8,
            "max_critique_length": 6,
            "prompts_per_step": 2,
            **keys,
        }
    )


def revision_loop(
    generator: Generator,
    constitution: Constitution,
    folder: Path,
    texts: Sequence[str] = TEXTS,
    progress: Progress | None = None,
    interrupt: Event | None = None,
    max_model_len: int = 200,
    **keys: object,
) -> RevisionLoop:
    run = stage_run(folder, progress, interrupt=interrupt)
    formatter = ChatFormatter(tiny_tokenizer(), (2,))
    return RevisionLoop(
        section(**keys), constitution, generator, formatter, prompts_of(*texts), max_model_len, run
    )


def collect(loop: RevisionLoop) -> list[Revision]:
    try:
        return loop()
    finally:
        loop.run.close()


@dataclass
class Scripted:
    """Says the next line of the script to each prompt, whatever it is asked; `...` at a line's end: was cut.

    Fields:
        heard: what it was asked, in order. lengths: how many tokens it might say.
    """

    script: dict[str, list[str]]
    heard: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def generate(self, prompts: Prompts, sampling: SamplingSpec, seed: int) -> Sequence[Pending[Rollouts]]:
        tokenizer = tiny_tokenizer()
        self.lengths.append(sampling.max_completion_length)
        self.seeds.append(seed)
        lines = [self.script[messages[-1]["content"]].pop(0) for messages in prompts.messages]
        self.heard += [tokenizer.decode(row, skip_special_tokens=False) for row in prompts.token_ids]
        said = [tokenizer(line.removesuffix("..."))["input_ids"] for line in lines]
        finished = [not line.endswith("...") for line in lines]
        rows = [[*row, 2] if ended else row for row, ended in zip(said, finished, strict=True)]
        rollouts = rollouts_of([list(row) for row in prompts.token_ids], rows, finished)
        return [Done(rollouts)]


def turns(*texts: str) -> str:
    roles = ("user", "assistant") * len(texts)
    spoken = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in zip(roles, texts, strict=False)]
    return "".join(spoken) + "<|im_start|>assistant\n"


def test_two_rounds_word_by_word(constitution: Constitution, tmp_path: Path) -> None:
    """The revision takes the place of the answer in the second round."""
    script = Scripted({"Hi?": ["Go. ", "Rude.", "Hello...", "Curt.", "Hello there!"]})
    loop = revision_loop(script, constitution, tmp_path, ["Hi?"], num_rounds=2)
    (revision,) = collect(loop)
    first, second = (loop.principle_for(revision, number) for number in (0, 1))
    assert script.heard == [
        turns("Hi?"),
        turns("Hi?", "Go.", first.critique),
        turns("Hi?", "Go.", first.critique, "Rude.", first.revision),
        turns("Hi?", "Hello", second.critique),
        turns("Hi?", "Hello", second.critique, "Curt.", second.revision),
    ]
    assert script.lengths == [8, 6, 8, 6, 8]
    assert len(set(script.seeds)) == 5, "one turn's luck says nothing of the next one's"
    assert revision == Revision(
        prompt_id=0,
        sample_id=0,
        prompt=({"role": "user", "content": "Hi?"},),
        answer="Go.",
        rounds=(
            RevisionRound(first.id, "Rude.", "Hello"),
            RevisionRound(second.id, "Curt.", "Hello there!"),
        ),
        finished=True,
        outcome="used",
    )
    assert revision.final == "Hello there!"


@pytest.mark.parametrize(
    ("lines", "outcome", "final"),
    [
        (["Go.", "Rude.", "Hello."], "used", "Hello."),
        (["Go...", "Rude.", "Hello."], "used", "Hello."),
        (["Go.", "Rude...", "Hello."], "used", "Hello."),
        (["Go.", "Rude.", " Go. "], "unchanged", "Go."),
        (["Go.", "Rude.", "Hello..."], "cut", "Hello"),
        ([" "], "empty", ""),
        (["Go.", ""], "empty", "Go."),
        (["Go.", "Rude.", "  "], "empty", "Go."),
    ],
)
def test_what_becomes_of_an_answer(
    constitution: Constitution, tmp_path: Path, lines: list[str], outcome: str, final: str
) -> None:
    script = Scripted({"Hi?": [*lines], "Well?": ["One.", "Two.", "Three."]})
    revision, other = collect(revision_loop(script, constitution, tmp_path, ["Hi?", "Well?"]))
    assert (revision.outcome, revision.final) == (outcome, final)
    assert script.script["Hi?"] == [], "nothing more is asked than is needed"
    assert (other.outcome, other.final) == ("used", "Three."), "others go on"


def test_a_conversation_that_outgrows_the_model(constitution: Constitution, tmp_path: Path) -> None:
    script = Scripted({"Hi?": ["Go.", "Rude."]})
    formatter = ChatFormatter(tiny_tokenizer(), (2,))
    needed = [
        len(formatter.prompt_ids(messages)) + length
        for messages, length in (
            (constitution.critique_messages(constitution["kind"], prompts_of("Hi?").messages[0], "Go."), 6),
            (
                constitution.revision_messages(
                    constitution["kind"], prompts_of("Hi?").messages[0], "Go.", "Rude."
                ),
                8,
            ),
        )
    ]
    only_kind = replace(constitution, principles=constitution.principles[:1])
    loop = revision_loop(script, only_kind, tmp_path, ["Hi?"], max_model_len=needed[1] - 1)
    (revision,) = collect(loop)
    assert needed[0] < needed[1]
    assert (revision.outcome, revision.rounds[0].critique) == ("too long", "Rude.")
    assert longest_conversation(section(), only_kind, formatter, prompts_of("Hi?")) >= needed[1]


def test_principles_are_drawn_by_seed_prompt_sample_and_round(
    constitution: Constitution, tmp_path: Path
) -> None:
    loop = revision_loop(Scripted({}), constitution, tmp_path)
    drafts = [Revision(prompt, sample, ()) for prompt in range(50) for sample in range(2)]
    drawn = [loop.principle_for(draft, number).id for draft in drafts for number in range(2)]
    again = revision_loop(Scripted({}), constitution, tmp_path / "again", num_rounds=5, prompts_per_step=1)
    assert [again.principle_for(draft, number).id for draft in drafts for number in range(2)] == drawn
    # 200 draws of two: 100 each, standard deviation 7.
    assert 70 < drawn.count("kind") < 130
    assert len({tuple(drawn[start : start + 4]) for start in range(0, 200, 4)}) > 8
    other = replace(loop, run=replace(loop.run, seed=12))
    assert [other.principle_for(draft, number).id for draft in drafts for number in range(2)] != drawn


def real_engines(model: Path, count: int = 1) -> LocalGenerator:
    return LocalGenerator([HandFedGenerator(model, version=0) for _ in range(count)])


def test_stopped_and_resumed_says_nothing_twice(
    constitution: Constitution, model: Path, tmp_path: Path
) -> None:
    engines = real_engines(model)
    expected = collect(revision_loop(engines, constitution, tmp_path / "whole", num_generations=2))
    assert [(each.prompt_id, each.sample_id) for each in expected] == [
        (prompt, sample) for prompt in range(5) for sample in range(2)
    ]
    assert len({each.answer for each in expected}) > 8, "samples of a prompt differ"
    interrupt = Event()
    watcher = Watcher(1, interrupt.set)
    first = revision_loop(
        engines,
        constitution,
        tmp_path / "stopped",
        progress=watcher,
        interrupt=interrupt,
        num_generations=2,
    )
    with pytest.raises(Interrupted, match=r"stopped after step 1, saved; go on with --resume"):
        collect(first)
    assert len(first.parts.done()) == 1
    assert first.run.checkpoints.latest() is None, "its files are its state"
    second = revision_loop(engines, constitution, tmp_path / "stopped", num_generations=2)
    assert collect(second) == expected
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")
    third = revision_loop(Scripted({}), constitution, tmp_path / "stopped", num_generations=2)
    assert collect(third) == expected, "asks nobody"


def test_neither_engines_nor_steps_matter(constitution: Constitution, model: Path, tmp_path: Path) -> None:
    one = collect(revision_loop(real_engines(model), constitution, tmp_path / "one"))
    two = collect(revision_loop(real_engines(model, 2), constitution, tmp_path / "two", prompts_per_step=5))
    assert one == two


def test_another_dataset_is_refused(constitution: Constitution, model: Path, tmp_path: Path) -> None:
    collect(revision_loop(real_engines(model), constitution, tmp_path))
    other = revision_loop(real_engines(model), constitution, tmp_path, [*TEXTS[:4], "warm water"])
    with pytest.raises(CheckpointError, match="begun with other prompts: the dataset has changed since"):
        collect(other)
    other = revision_loop(real_engines(model), constitution, tmp_path, TEXTS[:4])
    with pytest.raises(CheckpointError, match="begun with 5 prompts, 2 a step"):
        collect(other)


def revisions(*outcomes: str) -> list[Revision]:
    return [
        Revision(
            number,
            0,
            ({"role": "user", "content": f"question {number}"},),
            f"answer {number}",
            (RevisionRound("kind", f"critique {number}", f"revision {number} ```"),),
            True,
            outcome,  # type: ignore[arg-type]
        )
        for number, outcome in enumerate(outcomes)
    ]


MIXED = revisions("used", "unchanged", "used", "used", "cut", "used", "used", "too long")


def test_the_file_comes_back_as_it_was(tmp_path: Path) -> None:
    write_revisions(tmp_path / "constitution.jsonl", MIXED)
    assert read_revisions(tmp_path / "constitution.jsonl") == MIXED


def test_rates() -> None:
    assert revision_metrics(MIXED) == {
        "constitution/answers": 8.0,
        "constitution/used": 5 / 8,
        "constitution/unchanged": 1 / 8,
        "constitution/empty": 0.0,
        "constitution/cut": 1 / 8,
        "constitution/too_long": 1 / 8,
    }
    assert revisions_note(MIXED) == (
        "8 answers were revised: used 62%, unchanged 12%, cut 12%, too long 12%."
    )


def test_three_examples_from_all_over() -> None:
    assert [each.prompt_id for each in choose_revisions(MIXED)] == [0, 3, 6]
    assert choose_revisions(revisions("cut")) == []
    assert len(choose_revisions(revisions("used", "used"))) == 2


def test_report_shows_all_that_was_said() -> None:
    text = revisions_markdown(MIXED)
    assert text.count("## Example") == 3
    for words in ("question 3", "answer 3", "critique (kind):", "critique 3", "revision 3", "unchanged 12%"):
        assert words in text
    assert "````text\nrevision 3 ```\n````" in text, "its fence is longer than what it holds"
    out = StringIO()
    render_revisions(Console(file=out, width=100), MIXED)
    for words in ("used 62%", "question 6", "critique (kind)  critique 6"):
        assert words in out.getvalue()


def test_steps_of_a_second_loop_follow_the_first(tmp_path: Path) -> None:
    first = stage_run(tmp_path)
    first.begin(0, 2)
    for step in range(2):
        first.log(step, {"a": float(step)})
    first.close()
    second = replace(stage_run(tmp_path), first_step=2)
    second.begin(0, 3)
    for step in range(3):
        second.log(step, {"b": float(step)})
    second.close()
    resumed = replace(stage_run(tmp_path), first_step=2)
    resumed.begin(1, 3)
    assert resumed.last_metrics["b"] == 0.0
    resumed.log(1, {"b": 10.0})
    resumed.close()
    found = [(row["step"], row.get("a"), row.get("b")) for row in logged(tmp_path)]
    assert found == [(0, 0.0, None), (1, 1.0, None), (2, None, 0.0), (3, None, 10.0)]


def test_other_seeds_say_other_things(constitution: Constitution, model: Path, tmp_path: Path) -> None:
    loop = revision_loop(real_engines(model), constitution, tmp_path / "one")
    other = replace(loop, run=replace(stage_run(tmp_path / "two"), seed=12))
    ours, theirs = collect(loop), collect(other)
    assert np.mean([a.answer != b.answer for a, b in zip(ours, theirs, strict=True)]) > 0.5


def test_another_constitution_is_refused(constitution: Constitution, model: Path, tmp_path: Path) -> None:
    interrupt = Event()
    stop = Watcher(1, interrupt.set)
    first = revision_loop(
        real_engines(model), constitution, tmp_path / "run", progress=stop, interrupt=interrupt
    )
    with pytest.raises(Interrupted):
        collect(first)
    before = first.parts.done()
    edited = tmp_path / "edited.yaml"
    edited.write_text(PRINCIPLES.replace("Be kind.", "Be kinder."))
    other = revision_loop(Scripted({}), load_constitution(str(edited)), tmp_path / "run")
    with pytest.raises(
        CheckpointError,
        match="begun with other principles of the constitution; resume with the same, or start a new run in "
        "another output_dir",
    ):
        collect(other)
    assert other.parts.done() == before
    edited.write_text(PRINCIPLES)
    same = revision_loop(real_engines(model), load_constitution(str(edited)), tmp_path / "run")
    assert len(collect(same)) == 5, "the file's name does not matter"
