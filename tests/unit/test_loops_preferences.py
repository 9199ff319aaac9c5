"""Collecting preferences: agreement, the dataset that comes out, and going on after a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest

from rlhf_ray.config.schema import (
    ConstitutionAnnotator,
    DatasetSection,
    ModelSection,
    PreferencesSection,
    SimulatedAnnotator,
)
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.constitution import load_constitution
from rlhf_ray.data.formats import PreferenceExample, preference_examples
from rlhf_ray.data.loading import load_rows
from rlhf_ray.errors import CheckpointError, DataError, Interrupted
from rlhf_ray.loops.preferences import PreferencesLoop, agreement, judged_by_people, read_part, write_dataset
from rlhf_ray.reporting.progress import Progress
from rlhf_ray.seeds import derive_seed
from rlhf_ray.types import JudgedPair
from rlhf_ray.workers.feedback import FeedbackAnnotator
from tests.fakes import HandFedGenerator, Watcher
from tests.local_roles import (
    LocalAnnotators,
    LocalFeedbackEngine,
    LocalGenerator,
    annotators,
    logged,
    stage_run,
)
from tests.samples import prompts_of
from tests.tiny import tiny_model_folder, tiny_tokenizer

USER = ({"role": "user", "content": "How so?"},)
TEXTS = ("boil an egg", "the capital", "a train", "soft yolk", "cold water")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


def judged(*votes: dict[str, int]) -> list[JudgedPair]:
    return [JudgedPair(number, USER, ("left", "right"), vote, {}) for number, vote in enumerate(votes)]


def test_agreement_by_hand() -> None:
    """Two annotators, four pairs, three of which they agree on.

    Krippendorff's alpha, nominal: of 8 votes 3 are "0" and 5 are "1". Observed disagreement 1/4; expected
    2 * 3 * 5 / (8 * 7) = 15/28. alpha = 1 - (1/4) / (15/28) = 8/15.
    """
    pairs = judged({"a": 0, "b": 0}, {"a": 1, "b": 1}, {"a": 1, "b": 1}, {"a": 0, "b": 1})
    assert agreement(pairs) == {
        "preferences/pairs": 4.0,
        "preferences/agreement": 0.75,
        "preferences/krippendorff_alpha": pytest.approx(8 / 15),
    }


def test_agreement_counts_only_pairs_that_two_have_seen() -> None:
    """A third annotator saw one pair; agreements are (a, b) on two pairs, (a, c) and (b, c) on one."""
    pairs = judged({"a": 0, "b": 0, "c": 1}, {"a": 1, "b": 1}, {"c": 1})
    assert agreement(pairs)["preferences/agreement"] == pytest.approx(2 / 4)


def test_agreement_of_one_and_of_none() -> None:
    assert agreement(judged({"a": 0}, {"a": 1})) == {"preferences/pairs": 2.0}
    assert agreement([]) == {"preferences/pairs": 0.0}


def test_alpha_is_left_out_where_all_votes_are_alike() -> None:
    found = agreement(judged({"a": 1, "b": 1}, {"a": 1, "b": 1}))
    assert found == {"preferences/pairs": 2.0, "preferences/agreement": 1.0}


def test_votes_on_different_pairs_are_not_compared() -> None:
    """People's pairs beside those of a simulated annotator."""
    assert agreement(judged({"a": 1}, {"b": 0})) == {"preferences/pairs": 2.0}
    lonely = judged({"a": 1, "b": 1}, {"a": 1, "b": 1}, {"c": 0})
    assert agreement(lonely) == {"preferences/pairs": 3.0, "preferences/agreement": 1.0}


def test_mean_gold() -> None:
    pair = JudgedPair(0, USER, ("x", "y"), {"a": 0}, {"a": (1.0, 4.0)})
    assert agreement([pair])["preferences/gold_mean"] == 2.5


def test_dataset_is_what_the_reward_stage_reads(tmp_path: Path) -> None:
    pairs = [
        JudgedPair(3, USER, ("bad", "good"), {"a": 1, "b": 1, "c": 0}, {"a": (0.5, 2.0), "b": (9.0, 9.5)}),
        JudgedPair(4, USER, ("even", "odd"), {"a": 1, "b": 0}, {}),
        JudgedPair(5, USER, ("first", "second"), {"a": 0}, {}),
    ]
    path = tmp_path / "preferences.jsonl"
    assert write_dataset(path, pairs) == 2, "a draw is left out"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0] == {
        "prompt": list(USER),
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
        "margin": pytest.approx(1 / 3),
        "votes": {"a": 1, "b": 1, "c": 0},
        "gold_chosen": 2.0,
        "gold_rejected": 0.5,
    }
    examples, skipped = preference_examples(load_rows(DatasetSection(path=str(path)), seed=0))
    assert len(skipped) == 0
    found = {(example.chosen, example.rejected): example for example in examples}
    assert found.keys() == {("good", "bad"), ("first", "second")}
    assert found["good", "bad"].messages == USER
    assert found["good", "bad"].margin == pytest.approx(1 / 3)
    assert found["first", "second"].margin == 1.0


def test_soft_labels_are_of_the_winner(tmp_path: Path) -> None:
    """Alone 0.3 and 0.8 for the second answer; with a vote for it, 0.3 becomes (0.3 + 1) / 2."""
    pairs = [
        JudgedPair(0, USER, ("left", "right"), {"ai": 0}, {}, {"ai": 0.3}),
        JudgedPair(1, USER, ("left", "right"), {"ai": 1}, {}, {"ai": 0.8}),
        JudgedPair(2, USER, ("left", "right"), {"ai": 0, "careful": 1}, {}, {"ai": 0.3}),
        JudgedPair(3, USER, ("left", "right"), {}, {}, {"ai": 0.5}),
        JudgedPair(4, USER, ("left", "right"), {}, {}),
        JudgedPair(5, USER, ("left", "right"), {"careful": 1}, {}),
    ]
    path = tmp_path / "preferences.jsonl"
    assert write_dataset(path, pairs) == 4, "the undecided and the unjudged are left out"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = [(row["chosen"][0]["content"], row.get("soft_label"), row["margin"]) for row in rows]
    assert found == [
        ("left", pytest.approx(0.7), pytest.approx(0.4)),
        ("right", pytest.approx(0.8), pytest.approx(0.6)),
        ("right", pytest.approx(0.65), pytest.approx(0.3)),
        ("right", None, 1.0),
    ]
    examples, _ = preference_examples(load_rows(DatasetSection(path=str(path)), seed=0))
    assert [example.soft_label for example in examples] == pytest.approx([0.7, 0.8, 0.65, 1.0])


def test_a_dataset_of_draws_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pair of different answers has a winner"):
        write_dataset(tmp_path / "preferences.jsonl", judged({"a": 1, "b": 0}))


def test_peoples_preferences_are_votes(tmp_path: Path) -> None:
    examples = [PreferenceExample(7, USER, "good", "bad", 0.0, {})]
    (pair,) = judged_by_people("people", examples)
    assert (pair.answers[pair.votes["people"]], pair.preferred, pair.prompt_id) == ("good", 1, 7)


def test_peoples_soft_labels_are_kept(tmp_path: Path) -> None:
    """One who is exactly undecided prefers neither, and the pair teaches nothing."""
    source = tmp_path / "people.jsonl"
    rows = [
        {"prompt": "How so?", "chosen": f"good {label}", "rejected": "bad", "soft_label": label}
        for label in (0.8, 1.0, 0.5)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, _ = preference_examples(load_rows(DatasetSection(path=str(source)), seed=0))
    path = tmp_path / "preferences.jsonl"
    assert write_dataset(path, judged_by_people("people", examples)) == 2
    again, _ = preference_examples(load_rows(DatasetSection(path=str(path)), seed=0))
    assert [(pair.chosen, pair.soft_label) for pair in again] == [
        ("good 0.8", pytest.approx(0.8)),
        ("good 1.0", 1.0),
    ]


SECTION = PreferencesSection(
    annotators=(SimulatedAnnotator(name="one", function="tests.fakes:num_vowels", temperature=1.0),),
    num_generations=3,
    pairs_per_prompt=2,
    max_completion_length=8,
    prompts_per_step=2,
)


def preferences_loop(
    model: ModelSection,
    folder: Path,
    progress: Progress | None = None,
    interrupt: Event | None = None,
    num_prompts: int = len(TEXTS),
    num_engines: int = 1,
) -> tuple[PreferencesLoop, LocalAnnotators]:
    judges = annotators(model, [a for a in SECTION.annotators if isinstance(a, SimulatedAnnotator)], 2)
    engines = [HandFedGenerator(Path(model.path), version=0) for _ in range(num_engines)]
    run = stage_run(folder, progress, interrupt=interrupt)
    prompts = prompts_of(*TEXTS[:num_prompts])
    return PreferencesLoop(SECTION, LocalGenerator(engines), judges, prompts, run), judges


def collect(loop: PreferencesLoop) -> list[JudgedPair]:
    try:
        return loop()
    finally:
        loop.run.close()


def test_stopped_and_resumed_answers_nothing_twice(model: ModelSection, tmp_path: Path) -> None:
    whole, judges = preferences_loop(model, tmp_path / "whole")
    expected = collect(whole)
    assert judges.num_calls == 3, "5 prompts, 2 a step"
    assert len(expected) == 10
    assert [pair.prompt_id for pair in expected] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]

    interrupt = Event()
    first, judges = preferences_loop(
        model, tmp_path / "stopped", Watcher(1, interrupt.set), interrupt=interrupt
    )
    with pytest.raises(Interrupted):
        collect(first)
    assert judges.num_calls == 1
    second, judges = preferences_loop(model, tmp_path / "stopped")
    assert collect(second) == expected
    assert judges.num_calls == 2
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")
    third, judges = preferences_loop(model, tmp_path / "stopped")
    assert collect(third) == expected
    assert judges.num_calls == 0


def test_a_feedback_model_in_the_engine_that_answers(model: ModelSection, tmp_path: Path) -> None:
    """By real log-probs, stopped and resumed; every judgement is kept."""
    engine = HandFedGenerator(Path(model.path), version=0)
    (tmp_path / "short.yaml").write_text(
        'principles:\n  - {id: kind, critique: a, revision: b, choice: "Kinder?", source: s}\n'
    )
    ai = FeedbackAnnotator(
        ConstitutionAnnotator(type="constitution", name="ai"),
        load_constitution(str(tmp_path / "short.yaml")),
        ChatFormatter(tiny_tokenizer(), (2,)),
        LocalFeedbackEngine([engine, engine]),
        max_model_len=200,
        seed=11,
    )

    def loop(folder: Path, **stop: object) -> PreferencesLoop:
        plain, _ = preferences_loop(model, folder, **stop)  # type: ignore[arg-type]
        return replace(plain, feedback=(ai,))

    expected = collect(loop(tmp_path / "whole"))
    assert len(expected) == 10
    for pair in expected:
        (said,) = pair.judgements
        assert set(pair.votes) == {"one", "ai"}
        assert pair.probabilities == {"ai": said.probability}
        assert 0 < said.straight < 1
    interrupt = Event()
    with pytest.raises(Interrupted):
        collect(loop(tmp_path / "stopped", progress=Watcher(1, interrupt.set), interrupt=interrupt))
    ai.constitution = replace(ai.constitution, fingerprint="another")
    with pytest.raises(CheckpointError, match="begun with other principles of annotator ai; resume with"):
        collect(loop(tmp_path / "stopped"))
    ai.constitution = load_constitution(str(tmp_path / "short.yaml"))
    assert collect(loop(tmp_path / "stopped")) == expected
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")
    assert logged(tmp_path / "whole")[0]["preferences/principle/kind"] == 4.0


def test_the_number_of_engines_does_not_matter(model: ModelSection, tmp_path: Path) -> None:
    one, _ = preferences_loop(model, tmp_path / "one")
    two, _ = preferences_loop(model, tmp_path / "two", num_engines=2)
    assert collect(two) == collect(one)


def test_a_part_comes_back_as_it_was(model: ModelSection, tmp_path: Path) -> None:
    loop, judges = preferences_loop(model, tmp_path, num_prompts=2)
    found = collect(loop)
    (rollouts,) = loop.generator.generate(loop.prompts, loop.sampling, derive_seed(loop.run.seed, 0))
    assert read_part(loop.parts.path(0)) == found == judges.annotate(rollouts).result()


def test_another_dataset_is_refused(model: ModelSection, tmp_path: Path) -> None:
    """The last file of five prompts has one prompt; with six, the sixth would never be answered."""
    first, _ = preferences_loop(model, tmp_path)
    collect(first)
    other, _ = preferences_loop(model, tmp_path, num_prompts=4)
    with pytest.raises(
        CheckpointError, match="begun with 5 prompts, 2 a step, and now there are 4, 2 a step"
    ):
        collect(other)
    changed = replace(first.prompts, columns=({"gold": 1},) * 5)
    with pytest.raises(CheckpointError, match="begun with other prompts: the dataset has changed since"):
        collect(replace(first, prompts=changed))
