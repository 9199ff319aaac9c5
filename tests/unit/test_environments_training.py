"""What training makes of episodes: only sampled tokens count, each turn has its own reward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.algorithms.advantages import move_turn_rewards
from rlhf_ray.config.schema import ModelSection, OnlineSection
from rlhf_ray.errors import EnvironmentFailure
from rlhf_ray.models.heads import PolicyModel
from rlhf_ray.models.loading import load_policy_model
from rlhf_ray.reporting.lineage import lineage_path, read_lineage
from rlhf_ray.types import Metrics, Ragged, RLBatch, Rollouts, Scores, StepInfo
from rlhf_ray.workers.experience import ExperienceWorker
from rlhf_ray.workers.objectives import PolicyObjective, ValueObjective
from rlhf_ray.workers.sampled import num_turns
from tests.local_roles import CPU, logged, online_section, reward_worker, weights_of
from tests.ranks import EXACT
from tests.samples import random_rollouts, rollouts_of
from tests.tiny import tiny_model_folder, tiny_tokenizer
from tests.unit.test_loops_online import online_loop, policy_of, train

ENVIRONMENT = {"class_path": "tests.environments:Vowels", "max_turns": 2, "max_episode_length": 100}
HAND = {
    "gamma": 0.9,
    "lam": 0.5,
    "kl_coef": 0.1,
    "missing_eos_penalty": 1.0,
    "whiten_advantages": False,
    "environment": ENVIRONMENT,
}
JUNK = float("nan")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


def per_token(*rows: list[float]) -> Ragged:
    return Ragged.from_rows(rows, np.float32)


def episodes(
    responses: list[list[int]],
    is_sampled: list[list[bool]],
    turn_rewards: list[list[float]] | None = None,
    failures: tuple[str | None, ...] | None = None,
    **options: object,
) -> Rollouts:
    plain = rollouts_of([[1, 30 + row] for row in range(len(responses))], responses, **options)  # type: ignore[arg-type]
    rewards = plain.turn_rewards if turn_rewards is None else per_token(*turn_rewards)
    return replace(
        plain,
        is_sampled=Ragged.from_rows(is_sampled, np.bool_),
        turn_rewards=rewards,
        failures=failures or plain.failures,
    )


GAPS = [[True, False, False, True], [True]]
ROLLOUTS = episodes([[40, 77, 78, 2], [50]], GAPS, finished=[True, False], prompt_ids=[4, 9], version=3)
OLD = per_token([-1.0, JUNK, JUNK, -2.0], [-3.0])
REF = per_token([-1.5, JUNK, JUNK, -1.0], [-3.0])
VALUES = per_token([0.5, JUNK, JUNK, 1.0], [0.25])


def prepare(
    model: ModelSection, folder: Path, section: OnlineSection, rollouts: Rollouts, *scores: float
) -> tuple[RLBatch, Metrics]:
    total = np.array(scores, np.float32)
    worker = ExperienceWorker(section, model, folder)
    return worker.prepare(StepInfo(3, 3, 0.1), 1, OLD, VALUES, rollouts, Scores(total, {}), REF)


def test_gae_passes_over_what_the_environment_said(model: ModelSection, tmp_path: Path) -> None:
    """As if the answers stood one after the other, with NaN wherever nothing was sampled.

    Row 0: score 2, k1 = (0.5, -1), so rewards (-0.05, 2.1): A_1 = 2.1 - 1, and
    A_0 = -0.05 + 0.9 * 1 - 0.5 + 0.45 * 1.1. Row 1: 0.5 less 1 for the missing EOS, and less V.
    """
    batch, metrics = prepare(model, tmp_path, online_section(**HAND), ROLLOUTS, 2.0, 0.5)
    np.testing.assert_allclose(batch.advantages.values, [0.845, 0, 0, 1.1, -0.75], rtol=1e-6)
    np.testing.assert_allclose(batch.returns.values, [1.345, 0, 0, 2.1, -0.5], rtol=1e-6)
    assert batch.is_trained.values.tolist() == [True, False, False, True, True]
    assert batch.importance_weights.values[1:3].tolist() == [1.0, 1.0]
    assert batch.responses.values.tolist() == ROLLOUTS.responses.values.tolist()
    expected = {
        "length/mean": 1.5,
        "length/max": 2.0,
        "perf/generated_tokens": 3.0,
        "kl/per_token": -0.5 / 3,
        "kl/per_sequence": -0.5 / 2,
        "reward/kl_penalty": (0.05 - 0.1) / 2,
        # The sampler said -1 for every token.
        "mismatch/logprob_diff_mean": (0 + 1 + 2) / 3,
        "mismatch/logprob_diff_max": 2.0,
        "environment/turns": 1.5,
        "environment/observation_tokens": 1.0,
        "environment/failed_fraction": 0.0,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name
    assert np.isfinite(list(metrics.values())).all()


def test_rewards_of_turns_by_hand(model: ModelSection, tmp_path: Path) -> None:
    """Of 3 in all, 1.5 are the environment's: 0.5 for the first turn, 1 for the second.

    Rewards (0.5 - 0.05, 2.5 + 0.1): A_1 = 2.6 - 1, A_0 = 0.45 + 0.9 - 0.5 + 0.45 * 1.6.
    """
    rollouts = replace(ROLLOUTS, turn_rewards=per_token([0.5, 0, 0, 1.0], [0.0]))
    batch, metrics = prepare(model, tmp_path, online_section(**HAND), rollouts, 3.0, 0.5)
    np.testing.assert_allclose(batch.advantages.values, [1.57, 0, 0, 1.6, -0.75], rtol=1e-6)
    assert metrics["reward/mean"] == 1.75
    assert metrics["reward/shaped"] == pytest.approx((3.05 - 0.5) / 2)


def test_whitening_is_over_sampled_tokens(model: ModelSection, tmp_path: Path) -> None:
    section = online_section(**{**HAND, "whiten_advantages": True})
    batch, _ = prepare(model, tmp_path, section, ROLLOUTS, 2.0, 0.5)
    raw = np.array([0.845, 1.1, -0.75])
    white = (raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(batch.advantages.values, [white[0], 0, 0, *white[1:]], rtol=1e-5)


def test_moving_turn_rewards_keeps_the_sum_of_a_row() -> None:
    rewards = torch.tensor([0.0, 0.0, 2.0, 5.0])
    moved = move_turn_rewards(rewards, torch.tensor([0.5, 0.25, 1.0, 0.0]), torch.tensor([0, 3, 3, 4]))
    # What clipping took from the score (3 to 2, say) is missing at the end.
    assert moved.tolist() == [0.5, 0.25, 2.0 - 0.75, 5.0]


def test_episodes_that_failed_are_kept_and_not_compared_with(model: ModelSection, tmp_path: Path) -> None:
    """Three samples of a prompt, rewards 1, 9 (failed), 3: the mean is that of two."""
    rollouts = episodes(
        [[40, 2], [41, 2], [42, 2]],
        [[True, True]] * 3,
        failures=(None, "step: raised KeyError: 7", None),
        prompt_ids=[0, 0, 0],
    )
    section = online_section(algorithm="dr_grpo", kl_coef=0.0, num_generations=3, environment=ENVIRONMENT)
    worker = ExperienceWorker(section, model, tmp_path)
    scores = Scores(np.array([1.0, 9.0, 3.0], np.float32), {})
    flat = rollouts.logprobs
    batch, metrics = worker.prepare(StepInfo(0, 0, 0.0), 1, flat, None, rollouts, scores, flat)
    assert batch.advantages.values.tolist() == [-1.0, -1.0, 0.0, 0.0, 1.0, 1.0]
    assert batch.is_trained.values.tolist() == [True, True, False, False, True, True]
    assert metrics["environment/failed_fraction"] == pytest.approx(1 / 3)
    assert metrics["reward/mean"] == 2.0
    lineage = read_lineage(lineage_path(tmp_path, 0))
    assert [sample.failure for sample in lineage] == [None, "step: raised KeyError: 7", None]
    assert [sample.finish_reason for sample in lineage] == ["stop", "failed", "stop"]
    assert worker.num_informative(rollouts, scores) == 1
    same = Scores(np.array([1.0, 9.0, 1.0], np.float32), {})
    assert worker.num_informative(rollouts, same) == 0

    records = worker.evaluate(None, rollouts, Scores(scores.total, {"environment": scores.total}))
    assert [record.rewards["environment"] for record in records][::2] == [1.0, 3.0]
    assert np.isnan(records[1].rewards["environment"])

    none_left = replace(rollouts, failures=("a", "b", "c"))
    with pytest.raises(
        EnvironmentFailure, match="no episode of this step can be trained on; the first failure: a"
    ):
        worker.prepare(StepInfo(0, 0, 0.0), 1, flat, None, none_left, scores, flat)


def test_a_greedy_episode_that_failed_is_nothing_to_compare_with(model: ModelSection, tmp_path: Path) -> None:
    section = online_section(algorithm="remax", kl_coef=0.0, environment=ENVIRONMENT)
    rollouts = episodes([[40, 2], [41, 2]], [[True, True]] * 2, prompt_ids=[0, 1])
    greedy = replace(rollouts, failures=(None, "reset: raised OSError: full"))
    scores = [Scores(np.array(total, np.float32), {}) for total in ([3.0, 3.0], [1.0, 0.0])]
    worker = ExperienceWorker(section, model, tmp_path)
    flat = rollouts.logprobs
    batch, _ = worker.prepare(StepInfo(0, 0, 0.0), 1, flat, None, rollouts, greedy, *scores, flat, flat)
    assert batch.advantages.values.tolist() == [2.0, 2.0, 0.0, 0.0]
    assert batch.is_trained.values.tolist() == [True, True, False, False]


def test_scores_of_the_environment_and_of_functions(model: ModelSection) -> None:
    """A function gets the answers alone; the environment's rewards count with weight 1."""
    tokenizer = tiny_tokenizer()
    first, said, second = (list(tokenizer(text)["input_ids"]) for text in ("boil", "aeiou", "an egg"))
    mask = [[True] * (len(first) + 1) + [False] * len(said) + [True] * (len(second) + 1)]
    rewards = [0.0] * len(mask[0])
    rewards[len(first)], rewards[-1] = 0.25, 1.0
    rollouts = episodes([[*first, 2, *said, *second, 2]], mask, [rewards])
    section = online_section(environment=ENVIRONMENT, rewards=[{**VOWELS, "weight": 0.5}])
    worker = reward_worker(model, [(section.rewards[0], None)], EXACT, has_environment=True)
    scores = worker.score(rollouts)
    assert scores.parts["vowels"].tolist() == [4.0], "of boil and an egg"
    assert scores.parts["environment"].tolist() == [1.25]
    assert scores.total.tolist() == [3.25]
    alone = reward_worker(model, [], EXACT, has_environment=True).score(rollouts)
    assert alone.total.tolist() == [1.25]
    assert num_turns(rollouts).tolist() == [2]


VOWELS = {"type": "function", "name": "vowels", "function": "tests.fakes:num_vowels"}


def gapped_batch() -> RLBatch:
    """Random rows of two turns; NaN wherever nothing was sampled."""
    plain = random_rollouts([(3, 7), (2, 9), (5, 6)])
    generator = np.random.default_rng(0)
    keep = np.concatenate([[1, 1, 0, 0, 0, 1, 1], [1, 0, 0, 1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 1, 1]]).astype(
        bool
    )
    size = len(keep)

    def column(values: np.ndarray) -> Ragged:
        return plain.responses.with_values(np.where(keep, values, JUNK).astype(np.float32))

    return RLBatch(
        prompt_ids=plain.prompt_ids,
        prompts=plain.prompts,
        responses=plain.responses,
        old_logprobs=column(generator.uniform(-6, -4, size)),
        ref_logprobs=column(generator.uniform(-6, -4, size)),
        values=column(generator.standard_normal(size)),
        advantages=column(generator.standard_normal(size)),
        returns=column(generator.standard_normal(size)),
        importance_weights=column(np.ones(size)),
        is_trained=plain.responses.with_values(keep),
    )


def test_the_gradient_is_that_of_sampled_tokens(model: ModelSection) -> None:
    """Against full logits and the clipped surrogate written out, token by token."""
    batch = gapped_batch()
    section = online_section(algorithm="grpo", kl_coef=0.0, loss_aggregation="token", environment=ENVIRONMENT)
    objective = PolicyObjective(section, kl_coef=0.0)
    ours = PolicyModel(load_policy_model(model), 512)
    loss, metrics = objective.loss(ours, batch, False, CPU)
    (loss / objective.denominator(batch)).backward()

    plain = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    losses = []
    for row in range(len(batch)):
        prompt = len(batch.prompts[row])
        tokens = torch.tensor([*batch.prompts[row].tolist(), *batch.responses[row].tolist()])
        logprobs = plain(tokens[None]).logits[0].log_softmax(-1)
        for position, is_trained in enumerate(batch.is_trained[row]):
            if not is_trained:
                continue
            token = prompt + position
            ratio = (logprobs[token - 1, tokens[token]] - float(batch.old_logprobs[row][position])).exp()
            advantage = float(batch.advantages[row][position])
            losses.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
    assert len(losses) == 4 + 5 + 5
    torch.stack(losses).mean().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4)
    assert all(torch.isfinite(metric.values).all() for metric in metrics.values())


def test_a_batch_with_nothing_to_train_on_has_no_loss(model: ModelSection) -> None:
    batch = gapped_batch()
    nothing = replace(batch, is_trained=batch.is_trained.with_values(np.zeros(22, dtype=np.bool_)))
    section = online_section(environment=ENVIRONMENT)
    for objective in (PolicyObjective(section, kl_coef=0.0), ValueObjective(section)):
        assert objective.denominator(nothing) == 1.0


def test_a_constant_denominator_is_that_of_whole_episodes() -> None:
    section = online_section(algorithm="dr_grpo", environment=ENVIRONMENT, max_completion_length=8)
    assert PolicyObjective(section, kl_coef=0.0).denominator(gapped_batch()) == 3 * 100


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_episodes_are_learned_from(model: ModelSection, tmp_path: Path, algorithm: str) -> None:
    """Towards vowels in both of two turns."""
    section = online_section(
        algorithm=algorithm,
        num_steps=14,
        prompts_per_step=6,
        num_generations=6,
        max_completion_length=6,
        kl_coef=0.01,
        rewards=[],
        environment=ENVIRONMENT,
        optimizer={"learning_rate": 4e-3},
    )
    loop = online_loop(model, tmp_path, section)
    before, after = train(loop)
    log = logged(tmp_path)
    rewards = [float(row["reward/environment/mean"]) for row in log]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.7
    assert [row["reward/mean"] for row in log] == rewards
    assert log[0]["kl/per_token"] == 0.0
    assert log[0]["policy/ratio_max"] == 1.0
    assert all(row["mismatch/logprob_diff_max"] < 1e-4 for row in log)
    assert {row["environment/turns"] for row in log} == {2.0}
    assert log[0]["length/max"] <= 12
    for sample in read_lineage(lineage_path(tmp_path / "rollouts", 0)):
        assert sample.response.count("\n> user\n> more\n> assistant\n") == 1, sample.response
        assert len(sample.is_sampled) == len(sample.response_ids)
        assert sample.is_sampled[0] and sample.is_sampled[-1] and not all(sample.is_sampled)
    assert all(record.length <= 12 for record in [*before, *after])


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "ppo", "num_mini_batches": 2, "whiten_rewards": True, "normalize_rewards": True},
        {"algorithm": "dapo", "max_sampling_rounds": 3},
        {"algorithm": "gspo", "recompute_old_logprobs": False},
        {"algorithm": "remax", "importance_correction": "sequence_mask"},
        {"algorithm": "raft", "num_mini_batches": 4},
        {"algorithm": "reinforce_pp", "reward_clip": 1.0},
    ],
    ids=lambda options: options["algorithm"],
)
def test_algorithms_bear_episodes_that_fail(
    model: ModelSection, tmp_path: Path, options: dict[str, object]
) -> None:
    environment = {**ENVIRONMENT, "class_path": "tests.environments:Flaky"}
    section = online_section(
        num_steps=2, prompts_per_step=3, num_generations=4, rewards=[], environment=environment, **options
    )
    loop = online_loop(model, tmp_path, section)
    weights = weights_of(policy_of(loop).worker)
    train(loop)
    rows = logged(tmp_path)
    assert all(0 < row["environment/failed_fraction"] < 1 for row in rows)
    numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert np.isfinite(numbers).all()
    moved = weights_of(policy_of(loop).worker)
    assert all(np.isfinite(value).all() for value in moved.values())
    assert any((moved[name] != weights[name]).any() for name in weights)
    for step in range(2):
        for sample in read_lineage(lineage_path(tmp_path / "rollouts", step)):
            assert (sample.failure is None) == (sample.finish_reason != "failed")
            if sample.failure is not None:
                assert sample.advantage == 0.0
                assert sample.failure == "step: raised ValueError: three"


def test_the_number_of_engines_does_not_matter(model: ModelSection, tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "class_path": "tests.environments:Seeded"}
    section = online_section(num_steps=2, environment=environment)
    for count in (1, 2):
        train(online_loop(model, tmp_path / str(count), section, num_engines=count))
    for step in range(2):
        one, two = (read_lineage(lineage_path(tmp_path / str(count) / "rollouts", step)) for count in (1, 2))
        assert [sample.response_ids for sample in one] == [sample.response_ids for sample in two]
