"""Episodes of several turns: which tokens they are made of, and what environments may do to them."""

from __future__ import annotations

import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.engines.generation import Sample, sample_seed
from rlhf_ray.environments.calls import call_all
from rlhf_ray.environments.generator import EnvironmentGenerator
from rlhf_ray.environments.guessing import NumberGuessing
from rlhf_ray.environments.interface import Answer, StepResult
from rlhf_ray.errors import EnvironmentFailure, ModelError
from rlhf_ray.types import Prompts, Ragged, Rollouts, SamplingSpec
from tests.environments import ScriptedEngine
from tests.fakes import HandFedGenerator
from tests.local_roles import online_section, player_of
from tests.samples import prompts_of
from tests.tiny import CHATML, tiny_model_folder, tiny_tokenizer

START, END = 1, 2
TOKENIZER = tiny_tokenizer()


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


FOLLOWS = [*ids("\n"), START, *ids("user\nFor how long?"), END, *ids("\n"), START, *ids("assistant\n")]
"""What stands between an answer's EOS and the next answer, put together by hand."""
SPELT = [*ids("t"), *ids("h"), *ids("e")]
"""As no tokenizer writes "the": encoding the decoded answer again would give other ids."""


def sample(token_ids: list[int], logprob: float = -0.5) -> Sample:
    return Sample(token_ids, [logprob] * len(token_ids), [5] * len(token_ids), token_ids[-1] == END)


def player(
    engine: ScriptedEngine | HandFedGenerator,
    name: str,
    options: dict[str, object] | None = None,
    **more: object,
) -> EnvironmentGenerator:
    environment = {"class_path": f"tests.environments:{name}", "options": options or {}, **more}
    return player_of(engine, online_section(environment=environment, max_prompt_length=60))


def one_prompt(**columns: object) -> Prompts:
    prompts = prompts_of("boil an egg")
    return Prompts(prompts.ids, prompts.messages, prompts.token_ids, (columns,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("tiny"))


def test_what_was_sampled_is_never_encoded_again() -> None:
    """Two turns by hand: context of the second = first context + sampled ids + ids of the observation."""
    assert ids("the") != SPELT
    first, second = [*SPELT, END], [*ids("six"), END]
    engine = ScriptedEngine([sample(first, -0.5)], [sample(second, -0.25)])
    prompts = one_prompt()
    rollouts = player(engine, "Counting", {"turns": 2}).generate(prompts, SamplingSpec(8), seed=3)

    prompt = prompts.token_ids[0].tolist()
    assert [list(call[0].token_ids) for call in engine.requests] == [prompt, [*prompt, *first, *FOLLOWS]]
    assert [call[0].seed for call in engine.requests] == [sample_seed(3, 0, 0), sample_seed(3, 0, 0, 1)]
    assert rollouts.prompts[0].tolist() == prompt
    assert rollouts.responses[0].tolist() == [*first, *FOLLOWS, *second]
    gap = len(FOLLOWS)
    assert rollouts.is_sampled[0].tolist() == [True] * 4 + [False] * gap + [True] * len(second)
    assert rollouts.logprobs[0].tolist() == [-0.5] * 4 + [0.0] * gap + [-0.25] * len(second)
    assert set(rollouts.versions[0].tolist()) == {5}
    rewards = rollouts.turn_rewards[0]
    assert (rewards[3], rewards[-1], rewards.sum()) == (0.25, 0.5, 0.75)
    assert rollouts.finished.tolist() == [True]
    assert rollouts.failures == (None,)


def test_the_same_as_rendering_the_whole_conversation() -> None:
    """Where the sampled ids are those of the tokenizer, the context is the rendered conversation."""
    engine = ScriptedEngine(*[[sample([*ids(text), END])] for text in ("soft", "yolk", "cold")])
    player(engine, "Counting", {"turns": 3}).generate(one_prompt(), SamplingSpec(8), seed=0)
    conversation = [{"role": "user", "content": "boil an egg"}]
    for answer in ("soft", "yolk"):
        conversation += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "For how long?"},
        ]
    assert list(engine.requests[2][0].token_ids) == ChatFormatter(TOKENIZER, (END,)).prompt_ids(conversation)


def test_an_answer_that_was_cut_gets_an_eos_that_is_not_trained() -> None:
    engine = ScriptedEngine([sample(SPELT)], [sample(SPELT)])
    rollouts = player(engine, "Counting", {"turns": 2}).generate(one_prompt(), SamplingSpec(3), seed=0)
    assert rollouts.responses[0].tolist() == [*SPELT, END, *FOLLOWS, *SPELT]
    assert rollouts.is_sampled[0].tolist() == [True] * 3 + [False] * (1 + len(FOLLOWS)) + [True] * 3
    assert rollouts.turn_rewards[0][2] == 0.25, "at the last token that was sampled"
    assert rollouts.finished.tolist() == [False]


@pytest.mark.parametrize(("room", "num_turns", "finished"), [(0, 2, True), (-1, 1, False)])
def test_a_turn_that_may_not_fit_is_not_begun(room: int, num_turns: int, finished: bool) -> None:
    engine = ScriptedEngine([sample([*SPELT, END])], [sample([*SPELT, END])])
    longest = 4 + len(FOLLOWS) + 8 + room
    env = player(engine, "Counting", {"turns": 2}, max_episode_length=longest)
    rollouts = env.generate(one_prompt(), SamplingSpec(8), seed=0)
    assert len(engine.requests) == num_turns
    assert rollouts.finished.tolist() == [finished]
    assert rollouts.is_sampled[0][-1], "an episode ends with an answer"


def test_the_number_of_turns_is_limited() -> None:
    engine = ScriptedEngine(*[[sample([7, END])]] * 3)
    rollouts = player(engine, "Counting", max_turns=3).generate(one_prompt(), SamplingSpec(8), seed=0)
    assert len(engine.requests) == 3
    assert rollouts.responses[0].tolist() == [7, END, *FOLLOWS, 7, END, *FOLLOWS, 7, END]
    assert rollouts.turn_rewards[0].sum() == 0.25 + 0.5 + 0.75
    assert rollouts.finished.tolist() == [True]


def test_one_turn_is_the_plain_generator(folder: Path) -> None:
    engine = HandFedGenerator(folder, version=4)
    prompts, sampling = prompts_of("boil an egg", "the north"), SamplingSpec(8, num_generations=3)
    plain = engine.generate(prompts, sampling, seed=3)
    played = player(engine, "OneTurn").generate(prompts, sampling, seed=3)
    for field in fields(Rollouts):
        ours, theirs = getattr(played, field.name), getattr(plain, field.name)
        if isinstance(theirs, Ragged):
            assert np.array_equal(ours.offsets, theirs.offsets), field.name
            ours, theirs = ours.values, theirs.values
        if isinstance(theirs, np.ndarray):
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), field.name
        else:
            assert ours == theirs, field.name


def test_engines_do_not_matter_and_samples_of_a_prompt_face_one_task(folder: Path) -> None:
    prompts, sampling = (
        prompts_of("boil an egg", "the north", "cold water"),
        SamplingSpec(6, num_generations=2),
    )

    def play(rows: list[int]) -> Rollouts:
        return player(HandFedGenerator(folder, version=0), "Seeded", max_turns=3, num_threads=2).generate(
            prompts.select(rows), sampling, seed=7
        )

    whole = play([0, 1, 2])
    parts = Rollouts.concat([play([0, 1]), play([2])])
    for name in ("prompts", "responses", "is_sampled"):
        assert np.array_equal(getattr(parts, name).values, getattr(whole, name).values), name
    np.testing.assert_allclose(parts.logprobs.values, whole.logprobs.values, atol=1e-5)
    assert whole.messages == parts.messages
    tasks = [messages[-1]["content"] for messages in whole.messages]
    assert tasks[0] == tasks[1] and len(set(tasks)) == 3
    assert whole.responses[0].tolist() != whole.responses[1].tolist(), "the answers differ"


def test_a_beginning_is_appended_to_the_prompt() -> None:
    engine = ScriptedEngine([sample([7, END])])
    rollouts = player(engine, "Greeting", {"text": "soft yolk"}).generate(
        one_prompt(), SamplingSpec(8), seed=0
    )
    turns = ({"role": "user", "content": "boil an egg"}, {"role": "user", "content": "soft yolk"})
    assert rollouts.messages == (turns,)
    assert rollouts.prompts[0].tolist() == ChatFormatter(TOKENIZER, (END,)).prompt_ids(turns)

    engine = ScriptedEngine([sample([7, END])])
    long = player(engine, "Greeting", {"text": "soft " * 60}).generate(one_prompt(), SamplingSpec(8), seed=0)
    assert "more than online.max_prompt_length=60" in str(long.failures[0])
    assert long.prompts[0].tolist() == one_prompt().token_ids[0].tolist()


FAULTS = {
    "reset": "reset: raised RuntimeError: no room",
    "raise": "step: raised KeyError: 'gold'",
    "hang": "step: no answer within 0.3 s",
    "no result": "step: answered with str, not with a StepResult",
    "no observation": "step: is not done, and has no observation that could be answered",
    "nan": "step: reward nan",
    "role": "step: observation {'role': 'assistant', 'content': 'me'}: "
    "not a turn of the user, a tool or the system",
}


def test_an_environment_that_fails_ends_its_own_episode_only() -> None:
    faults = [None, *FAULTS]
    prompts = prompts_of(*["boil an egg"] * len(faults))
    prompts = Prompts(prompts.ids, prompts.messages, prompts.token_ids, tuple({"fault": f} for f in faults))
    answers = [sample([7, END])] * len(faults)
    # The second time, the episode that could not begin does not ask.
    engine = ScriptedEngine(answers, answers[1:])
    start = time.monotonic()
    rollouts = player(engine, "Broken", timeout=0.3).generate(prompts, SamplingSpec(8), seed=0)
    assert time.monotonic() - start < 10
    assert rollouts.failures == (None, *FAULTS.values())
    assert rollouts.turn_rewards[0].sum() == 2.0
    assert rollouts.responses[1].tolist() == [7, END], "every row has an answer"
    assert all(rollouts.is_sampled[row][-1] for row in range(len(faults)))


def test_calls_keep_their_order_and_their_number() -> None:
    running, most = [0], [0]
    lock = threading.Lock()

    def call(number: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01 * (5 - number))
        with lock:
            running[0] -= 1
        return number

    calls = [lambda number=number: call(number) for number in range(5)]
    assert call_all(calls, num_threads=2, timeout=5.0) == [0, 1, 2, 3, 4]
    assert most[0] == 2


def test_a_call_that_hangs_takes_no_place() -> None:
    forever = threading.Event()
    results = call_all([forever.wait, lambda: True, lambda: False], num_threads=1, timeout=0.2)
    assert isinstance(results[0], EnvironmentFailure)
    assert results[1:] == [True, False]
    forever.set()


# Loops over the messages, as templates do that are no good here.
NUMBERED = CHATML.replace("message['role'] + '\n'", "message['role'] + loop.revindex | string + '\n'")
LAST_ONLY = CHATML.replace("in messages", "in messages[-2:]")
NO_EOS = CHATML.replace("'<|im_end|>' + ", "")
HIDES_ANSWERS = CHATML.replace(
    "message['content'] + '<|im_end|>'",
    "('…' if message['role'] == 'assistant' and not loop.last else message['content']) + '<|im_end|>'",
)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (NUMBERED, "is not the beginning of the conversation"),
        (LAST_ONLY, "drops or rewrites earlier turns"),
        (HIDES_ANSWERS, "drops or rewrites earlier turns"),
        (NO_EOS, "ends an assistant's turn by no EOS token"),
    ],
    ids=["numbered", "last only", "hides answers", "no eos"],
)
def test_templates_that_cannot_continue_are_refused(template: str, said: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=said):
        ChatFormatter(tokenizer, (END,)).check_continues()


@pytest.mark.parametrize(
    ("template", "between"),
    [
        (CHATML, "\n<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"),
        (
            CHATML.replace(" + '\n' }}{% endfor", " }}{% endfor"),
            "<|im_start|>user\nHow?<|im_end|><|im_start|>assistant\n",
        ),
        (
            "{{ bos_token }}" + CHATML.replace("message['content']", "message['content'] | trim"),
            "\n<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
    ids=["chatml", "nothing after eos", "bos and trim"],
)
def test_templates_that_append_are_continued(template: str, between: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    formatter = ChatFormatter(tokenizer, (END,))
    formatter.check_continues()
    assert tokenizer.decode(formatter.continuation_ids([{"role": "user", "content": "How?"}])) == between


def guesses(secret: int, *texts: str) -> list[StepResult]:
    game = NumberGuessing(1, 10)
    game.reset([], {"secret": secret}, seed=0)
    return [game.step(Answer(text, (), finished=True)) for text in texts]


def test_the_guessing_game() -> None:
    """0.1 for a guess that the hints allow, 1 / n for the right one as the n-th."""
    found = guesses(7, "My guess: 5.", "3", "8", "perhaps 6 or 7", "7")
    assert [turn.observation for turn in found[:4]] == [
        "Higher.",
        "Higher.",
        "Lower.",
        "Answer with one number.",
    ]
    assert [turn.reward for turn in found] == pytest.approx([0.1, 0.0, 0.1, 0.0, 0.1 + 1 / 5])
    assert [turn.done for turn in found] == [False] * 4 + [True]
    assert guesses(7, "7")[0].reward == pytest.approx(1.1)
    with pytest.raises(ValueError, match="'secret' is 11, not from 1 to 10"):
        guesses(11)
