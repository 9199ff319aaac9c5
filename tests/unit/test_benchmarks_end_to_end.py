"""Comparing whole training runs: the same work for all arms, and what becomes of their steps.

The plain script is compared with the library where both compute the same thing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.end_to_end import (
    CASES,
    CONFIG,
    Case,
    check_same_work,
    differences,
    num_steps,
    plot,
    results_of,
    speed_result,
)
from benchmarks.paired import Options
from benchmarks.peers import plain_grpo
from benchmarks.peers.arms import ArmRun, change_json, endless_model, our_steps, work_of
from benchmarks.peers.work import Step, Stopwatch, Work, digest, rows_within
from rlhf_ray.algorithms.correction import Correction, importance_weights
from rlhf_ray.algorithms.group_advantages import group_relative
from rlhf_ray.algorithms.policy_losses import PolicyLossSpec, PolicyTokens, ppo_policy_loss
from rlhf_ray.config.checks import load_checked
from rlhf_ray.config.schema import ModelSection
from rlhf_ray.errors import RlhfRayError, UserError
from rlhf_ray.models.batching import before_responses, collate
from rlhf_ray.models.heads import PolicyModel
from rlhf_ray.models.loading import load_policy_model
from rlhf_ray.reporting.files import dump_line
from rlhf_ray.reporting.lineage import LineageBatch, write_lineage
from rlhf_ray.types import Ragged, Scores
from tests.samples import rollouts_of
from tests.tiny import tiny_model_folder

FIXED, FREE = CASES
STEP = Step(10.0, 2.0, 7.0, 0.5, "same", answers=5, prompt_tokens=140, answer_tokens=60, trained_tokens=60)


def run_of(*steps: Step) -> ArmRun:
    return ArmRun(seconds=99.0, peak_memory=1 << 30, steps=[STEP, *steps])


def runs(**changed: Step) -> dict[str, list[ArmRun]]:
    """Two runs of every arm, of a warm-up and a counted step; an arm's second run may differ."""
    return {arm: [run_of(STEP), run_of(changed.get(arm, STEP))] for arm in ("script", "TRL", "ours")}


# the work


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def work(model: Path) -> Work:
    small = ["online.prompts_per_step=3", "online.num_steps=4", "online.num_generations=2"]
    words = [f"model.path={model}", "seed=5", "online.dataset.limit=10", "online.max_prompt_length=480"]
    return work_of(load_checked(CONFIG, [*words, *small]))


def test_the_questions_are_those_that_our_loop_draws(work: Work) -> None:
    """Ten questions, three a step: the fourth step begins with the last of the first epoch."""
    drawn = [question.id for step in work.steps for question in step]
    assert len(set(drawn[:10])) == 10 and [len(step) for step in work.steps] == [3, 3, 3, 3]
    assert work.eos_ids == [2] and work.samples_per_step == 6 and work.rows_per_update == 3


def test_the_work_survives_its_file_and_scores_answers(work: Work, tmp_path: Path) -> None:
    work.write(tmp_path / "new" / "work.json")
    read = Work.read(tmp_path / "new" / "work.json")
    assert json.dumps(asdict(read)) == json.dumps(asdict(work))  # tuples have become lists
    (first, second), right = read.steps[0][:2], str(work.steps[0][0].entry["answer"])
    assert read.score([first, first, second], [f" {right}\n\nQuestion", "x", ""]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("rows", "width", "budget", "expected"),
    [
        (64, 64, 4096, 64),
        (64, 83, 4096, 32),
        (64, 135, 4096, 16),
        (6, 10, 35, 3),
        (7, 10, 35, 1),
        (2, 9, 1, 1),
    ],
)
def test_rows_of_a_pass_divide_those_of_an_update(rows: int, width: int, budget: int, expected: int) -> None:
    assert rows_within(rows, width, budget) == expected


def test_the_digest_tells_tokens_and_their_order() -> None:
    assert digest([[1, 2], [3]]) == digest([np.array([1, 2]), np.array([3])])
    assert len({digest(x) for x in ([[1, 2], [3]], [[3], [1, 2]], [[1], [2, 3]], [[1, 2, 3]])}) == 4


def test_an_endless_model_has_the_weights_and_another_end(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocabulary lacks <empty_output>"):
        endless_model(str(model), tmp_path / "first")
    source = tiny_model_folder(tmp_path / "source")
    text = (source / "tokenizer.json").read_text().replace("<|endoftext|>", "<empty_output>")
    (source / "tokenizer.json").write_text(text)
    change_json(source / "tokenizer_config.json", unk_token="<empty_output>")
    endless = endless_model(str(source), tmp_path / "endless")
    changed = work_of(load_checked(CONFIG, [f"model.path={endless}", "online.max_prompt_length=480"]))
    assert changed.eos_ids == [0]
    assert (endless / "model.safetensors").resolve() == (source / "model.safetensors").resolve()
    assert work_of(
        load_checked(CONFIG, [f"model.path={source}", "online.max_prompt_length=480"])
    ).eos_ids == [2]


def test_our_steps_are_read_from_metrics_and_samples(work: Work, tmp_path: Path) -> None:
    question = work.steps[0][0]
    ids = question.token_ids
    rollouts = replace(
        rollouts_of([ids, ids], [[5, 6, 2], [7, 2]], prompt_ids=[question.id] * 2), failures=(None, "broke")
    )
    zeros = np.zeros(2, dtype=np.float32)
    (tmp_path / "rollouts").mkdir()
    batch = LineageBatch(
        rollouts=rollouts,
        scores=Scores(total=zeros, parts={}),
        prompt_texts=["", ""],
        response_texts=["", ""],
        kl=zeros,
        advantages=rollouts.logprobs,
    )
    write_lineage(tmp_path / "rollouts", 0, batch)
    times = {"time/step": 9, "time/generate": 2, "time/old_logprobs": 1, "time/train_policy": 4}
    row = {"step": 0, **times, "reward/mean": 0.5, "perf/generated_tokens": 5}
    (tmp_path / "metrics.jsonl").write_text(dump_line(row))
    (step,) = our_steps(work, tmp_path)
    assert step == Step(9, 2, 5, 0.5, digest([ids]), 2, 2 * len(ids), answer_tokens=5, trained_tokens=3)
    assert step.rest == 2


# what is made of the steps


def test_speeds_leave_the_warm_up_out_and_rewards_are_of_the_end() -> None:
    steps = [
        replace(STEP, seconds=s, reward=r)
        for s, r in ((99, 0), (10, 0.1), (20, 0.2), (5, 0.3), (4, 0.5), (2, 0.7))
    ]
    run = ArmRun(1.0, 1, steps)
    assert run.speeds == [20, 10, 40, 50, 100]
    assert run.reward_reached == pytest.approx(0.6)
    assert run.curve()[:2] == [(99, 0), (109, 0.1)]


def test_speed_is_compared_step_by_step_with_the_same_seed() -> None:
    fast, slow = replace(STEP, seconds=5.0), replace(STEP, seconds=20.0)
    own = {"ours": [run_of(fast), run_of(STEP)], "TRL": [run_of(slow), run_of(replace(STEP, seconds=20.2))]}
    result = speed_result(FIXED, own, "TRL")
    assert result.figures == pytest.approx([4.0, 2.02]) and result.controls == pytest.approx([1.01])
    assert result.figure == pytest.approx(3.01) and result.verdict == "met"
    assert speed_result(FIXED, {arm: found[:1] for arm, found in own.items()}, "TRL").controls == []


def test_the_same_work_passes_and_gives_a_row_each(tmp_path: Path) -> None:
    check_same_work(FIXED, runs())
    results = results_of(FIXED, runs())
    assert [result.figure for result in results] == [1.0] * 5 + [99.0] * 3 + [0.5] * 3
    assert results[3].case == "12 tokens: peak memory, TRL"
    plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("case", "changed", "said"),
    [
        (FIXED, replace(STEP, prompts="others"), "TRL, run 2: other questions"),
        (FREE, replace(STEP, trained_tokens=59), "TRL, run 2, step 1: 60 tokens sampled, 59 trained on"),
        (FIXED, replace(STEP, answer_tokens=59, trained_tokens=59), "59 tokens in 5 answers"),
    ],
)
def test_other_work_ends_it(case: Case, changed: Step, said: str) -> None:
    with pytest.raises(RlhfRayError, match=said):
        check_same_work(case, runs(TRL=changed))


def test_what_is_drawn_by_lot_may_differ_a_little() -> None:
    longer = replace(STEP, answer_tokens=90, trained_tokens=90)
    check_same_work(FREE, runs(TRL=longer))
    assert differences(FREE, runs(TRL=longer)) == ["to 64 tokens, TRL, run 2: 430 tokens where ours did 400"]
    assert differences(FREE, runs(TRL=replace(STEP, answer_tokens=70))) == []


@pytest.mark.parametrize(("reached", "count"), [(0.6, 1), (0.8, 0)])
def test_arms_should_learn_alike(reached: float, count: int) -> None:
    rewards = {"ours": 0.9, "TRL": reached}
    learned = {arm: [ArmRun(1.0, 1, [replace(STEP, reward=r)] * 8)] for arm, r in rewards.items()}
    assert len(differences(FIXED, learned)) == count


def test_half_of_the_pairs_are_in_each_run() -> None:
    options = Options(False, 7, None, Path(), print)
    assert [num_steps(case, options) for case in CASES] == [8, 5]
    assert num_steps(FIXED, replace(options, quick=True)) == 2


def test_a_stopwatch_adds_up_and_forgets() -> None:
    watch = Stopwatch()
    for part in ("a", "b", "a"):
        with watch(part):
            pass
    taken = watch.take()
    assert set(taken) == {"a", "b"} and min(taken.values()) > 0 and watch.take() == {}


# the plain script computes what the library computes


def answers_of(*rows: tuple[list[int], list[int]]) -> list[plain_grpo.Answer]:
    generator = torch.Generator().manual_seed(0)
    return [
        plain_grpo.Answer(prompt, tokens, *(torch.randn((2, len(tokens)), generator=generator) - 3))
        for prompt, tokens in rows
    ]


def test_plain_micro_batches_hold_the_budget_and_every_answer() -> None:
    answers = answers_of(*[([1] * 3, [5] * length) for length in (2, 9, 1, 4, 7, 3)])
    batches = list(plain_grpo.micro_batches(answers, token_budget=24))
    assert [[len(answer) for answer in batch] for batch in batches] == [[12, 10], [7, 6, 5], [4]]


def test_plain_advantages() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    found = plain_grpo.advantages_of(rewards, 3)
    expected = group_relative(torch.tensor(rewards), torch.tensor([0, 0, 0, 1, 1, 1]), scale_by_std=True)
    assert found == pytest.approx(expected.tolist())


def test_plain_loss(work: Work) -> None:
    answers = answers_of(([1], [5, 6, 7]), ([1], [8, 9]))
    for answer, advantage in zip(answers, (1.5, -0.5), strict=True):
        answer.advantage = advantage
    old = torch.cat([answer.old_logprobs for answer in answers])
    sampler = torch.cat([answer.sampler_logprobs for answer in answers])
    logprobs = (old + torch.tensor([0.5, -0.5, 0.1, 0.6, -0.9])).requires_grad_()
    offsets, is_trained = torch.tensor([0, 3, 5]), torch.ones(5, dtype=torch.bool)
    correction = Correction("token", "truncate", work.importance_cap)
    weights = importance_weights(old, sampler, offsets, is_trained, correction)
    tokens = PolicyTokens(
        logprobs=logprobs,
        entropy=torch.zeros(5),
        old_logprobs=old,
        ref_logprobs=old,
        advantages=torch.tensor([1.5, 1.5, 1.5, -0.5, -0.5]),
        weights=torch.ones(5),
        importance_weights=weights,
    )
    expected, _ = ppo_policy_loss(tokens, PolicyLossSpec(work.cliprange, work.cliprange))
    found = plain_grpo.policy_loss(work, answers, logprobs)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert weights.max() == work.importance_cap  # some are cut


def test_plain_logprobs(model: Path) -> None:
    """Under the same autocast, of answers of several lengths."""
    policy = load_policy_model(ModelSection(path=str(model)))
    answers = answers_of(([1, 40, 41], [50, 51, 2]), ([1, 42], [52, 2]), ([1, 43, 44, 45], [53]))
    found = plain_grpo.logprobs_of(policy, answers, temperature=0.7, uses_bfloat16=True)
    sequences = Ragged.from_rows([answer.prompt + answer.tokens for answer in answers], np.int32)
    is_source = before_responses(np.array([len(answer.prompt) for answer in answers]), sequences)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        batch = collate(sequences, is_source, "padded", torch.device("cpu"))
        expected = PolicyModel(policy, 512)(batch, temperature=0.7).logprobs
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-4)
