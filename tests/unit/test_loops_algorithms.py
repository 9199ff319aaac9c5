"""Every algorithm of the online stage in the one loop: what it starts, trains on, and that it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.config.schema import RECIPES, ModelSection, OnlineSection
from rlhf_ray.reporting.lineage import SampleLineage, lineage_path, read_lineage
from tests.fakes import PowerCut, Watcher, cut_power
from tests.local_roles import logged, online_section, weights_of
from tests.tiny import tiny_model_folder
from tests.unit.test_loops_online import online_loop, policy_of, train

WITHOUT_CRITIC = sorted(RECIPES.keys() - {"ppo"})
EVEN = [{"type": "function", "name": "even", "function": "tests.fakes:even_length"}]
SAME = [{"type": "function", "name": "same", "function": "tests.fakes:always_one"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


def groups(folder: Path, step: int) -> list[list[SampleLineage]]:
    """The samples of a step by prompt."""
    found = read_lineage(lineage_path(folder / "rollouts", step))
    return [
        [s for s in found if s.prompt_id == prompt] for prompt in dict.fromkeys(s.prompt_id for s in found)
    ]


@pytest.mark.parametrize("algorithm", WITHOUT_CRITIC)
def test_reward_goes_up(model: ModelSection, tmp_path: Path, algorithm: str) -> None:
    """Towards more vowels, without a critic."""
    section = online_section(
        algorithm=algorithm,
        num_steps=16,
        prompts_per_step=6,
        num_generations=6,
        optimizer={"learning_rate": 4e-3},
    )
    loop = online_loop(model, tmp_path, section)
    assert loop.roles.critic is None
    train(loop)
    log = logged(tmp_path)
    rewards = [float(row["reward/mean"]) for row in log]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.7
    assert log[0]["kl/per_token"] == 0.0
    assert log[0]["policy/ratio_max"] == 1.0
    assert not [name for row in log for name in row if name.startswith("critic/")]


def test_group_advantages_reach_the_lineage(model: ModelSection, tmp_path: Path) -> None:
    section = online_section(algorithm="rloo", num_steps=1, num_generations=3, kl_coef=0.0)
    train(online_loop(model, tmp_path, section))
    for group in groups(tmp_path, 0):
        for sample in group:
            others = [other.reward for other in group if other is not sample]
            assert sample.advantage == pytest.approx(sample.reward - np.mean(others), abs=1e-6)


def test_remax_compares_with_the_greedy_answer(model: ModelSection, tmp_path: Path) -> None:
    """At a temperature near 0 every sample is the greedy answer, and there is nothing to learn."""
    cold = online_section(algorithm="remax", num_steps=2, temperature=1e-4, kl_coef=0.0)
    train(online_loop(model, tmp_path / "cold", cold))
    advantages = [s.advantage for step in (0, 1) for group in groups(tmp_path / "cold", step) for s in group]
    assert advantages == [0.0] * 8

    warm = online_section(algorithm="remax", num_steps=1, num_generations=4, kl_coef=0.0)
    train(online_loop(model, tmp_path / "warm", warm))
    for group in groups(tmp_path / "warm", 0):
        baselines = [sample.reward - sample.advantage for sample in group]
        assert baselines == pytest.approx([baselines[0]] * 4), "one baseline a prompt"


def test_raft_trains_on_the_best_alone(model: ModelSection, tmp_path: Path) -> None:
    train(online_loop(model, tmp_path, online_section(algorithm="raft", num_steps=1, num_generations=4)))
    for group in groups(tmp_path, 0):
        (best,) = [sample for sample in group if sample.advantage == 1.0]
        assert best.reward == max(sample.reward for sample in group)
        assert sorted(sample.advantage for sample in group) == [0.0, 0.0, 0.0, 1.0]


def test_dynamic_sampling_looks_for_prompts_that_say_something(model: ModelSection, tmp_path: Path) -> None:
    """Two answers a prompt and a reward of 0 or 1: about half of the prompts are of no use."""
    section = online_section(algorithm="dapo", num_steps=3, rewards=EVEN, overlong_buffer=0.0)
    train(online_loop(model, tmp_path, section))
    log = logged(tmp_path)
    for step, row in enumerate(log):
        found = groups(tmp_path, step)
        assert [len(group) for group in found] == [2, 2], "the batch keeps its size"
        num_drawn = 2 * row["sampling/rounds"]
        num_informative = round(row["sampling/informative_fraction"] * num_drawn)
        is_told_apart = [group[0].reward != group[1].reward for group in found]
        assert sum(is_told_apart) == min(2, num_informative)
    assert max(row["sampling/rounds"] for row in log) > 1


def test_dynamic_sampling_goes_on_where_nothing_is_told_apart(model: ModelSection, tmp_path: Path) -> None:
    section = online_section(algorithm="dapo", num_steps=1, rewards=SAME, overlong_buffer=0.0)
    loop = online_loop(model, tmp_path, section)
    before = weights_of(policy_of(loop).worker)
    train(loop)
    (row,) = logged(tmp_path)  # 6 prompts, 2 a round
    assert (row["sampling/rounds"], row["sampling/informative_fraction"]) == (3.0, 0.0), (
        "6 prompts, 2 a round"
    )
    after = weights_of(policy_of(loop).worker)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_resumed_dapo_equals_an_uninterrupted_one(model: ModelSection, tmp_path: Path) -> None:
    """The cursor has moved on by as many prompts as were drawn, not by as many as were trained on."""
    section = online_section(algorithm="dapo", num_steps=4, rewards=EVEN)
    train(online_loop(model, tmp_path / "whole", section))
    with pytest.raises(PowerCut):
        train(online_loop(model, tmp_path / "cut", section, Watcher(3, cut_power), every=2))
    train(online_loop(model, tmp_path / "cut", section, every=2))
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")


def test_without_a_reference(model: ModelSection, tmp_path: Path) -> None:
    section = online_section(algorithm="dr_grpo", num_steps=2, track_kl=False, eval_every=1)
    loop = online_loop(model, tmp_path, section)
    assert loop.roles.reference is None
    before, after = train(loop)
    names = {name for row in logged(tmp_path) for name in row}
    assert not [name for name in names if name.startswith("kl/per")]
    assert "eval/kl" not in names
    assert "eval/reward/vowels" in names
    assert np.isnan([record.kl for record in before + after]).all()


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "grpo", "importance_correction": "token_mask"},
        {"algorithm": "grpo", "importance_correction": "none", "track_kl": False, "kl_coef": 0.0},
        {"algorithm": "gspo", "importance_correction": "geometric_mask"},
        {"algorithm": "cispo", "importance_correction": "sequence_truncate"},
        {"algorithm": "raft"},
    ],
)
def test_old_logprobs_of_the_update_itself(
    model: ModelSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    """The forward pass of a step's only optimizer step is of the old policy: one pass less, and the same
    training. The cap is so low that the correction has something to do."""
    section = online_section(**options, num_steps=2, num_generations=4, importance_cap=1.0 + 1e-6)
    assert section.old_logprobs == "update"
    loop = online_loop(model, tmp_path / "update", section)
    train(loop)
    monkeypatch.setattr(OnlineSection, "old_logprobs", "forward")
    other = online_loop(model, tmp_path / "forward", section)
    train(other)
    for update, forward in zip(logged(tmp_path / "update"), logged(tmp_path / "forward"), strict=True):
        assert update.keys() == forward.keys()
        for name, value in forward.items():
            near = value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)
            assert update[name] == near, name
    weights = weights_of(policy_of(other).worker)
    for name, weight in weights_of(policy_of(loop).worker).items():
        np.testing.assert_allclose(weight, weights[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"algorithm": "grpo"}, "update"),
        ({"algorithm": "grpo", "num_mini_batches": 2}, "forward"),
        ({"algorithm": "grpo", "num_ppo_epochs": 2}, "forward"),
        ({"algorithm": "grpo", "recompute_old_logprobs": False}, "sampler"),
        ({"algorithm": "rloo"}, "forward"),  # the KL is in its rewards
        ({"algorithm": "rloo", "kl_coef": 0.0}, "update"),
        ({"algorithm": "ppo"}, "forward"),
    ],
)
def test_where_the_old_logprobs_come_from(options: dict[str, object], where: str) -> None:
    assert online_section(**{"num_generations": 4, **options}).old_logprobs == where


def test_old_logprobs_of_the_sampler(model: ModelSection, tmp_path: Path) -> None:
    """The engine here computes as the trainer does, so the two ways differ by rounding."""
    options = {"algorithm": "grpo", "num_steps": 2, "num_generations": 4}
    train(online_loop(model, tmp_path / "own", online_section(**options)))
    train(online_loop(model, tmp_path / "sampler", online_section(**options, recompute_old_logprobs=False)))
    for own, sampler in zip(logged(tmp_path / "own"), logged(tmp_path / "sampler"), strict=True):
        assert sampler["policy/loss"] == pytest.approx(own["policy/loss"], abs=1e-4)
        assert sampler["policy/grad_norm"] == pytest.approx(own["policy/grad_norm"], rel=1e-3)
        assert "mismatch/kl" in own
        assert "mismatch/kl" not in sampler
