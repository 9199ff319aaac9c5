"""PPO with all roles in this process: real workers, and the transformers engine."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import numpy as np
import pytest

from rlhf_ray.config.schema import FunctionReward, ModelSection, OnlineSection, SyncSection, TrainingSection
from rlhf_ray.errors import CheckpointError, Interrupted, RlhfRayError, WeightSyncError
from rlhf_ray.loops.online import OnlineLoop, evaluation_means
from rlhf_ray.reporting.evaluation import EvalRecord
from rlhf_ray.reporting.lineage import lineage_path, read_lineage
from rlhf_ray.reporting.progress import Progress
from tests.fakes import PowerCut, Watcher, cut_power
from tests.local_roles import (
    LocalCritic,
    LocalPolicy,
    logged,
    online_roles,
    online_section,
    stage_run,
    weights_of,
)
from tests.ranks import EXACT
from tests.samples import prompts_of
from tests.tiny import tiny_model_folder

TEXTS = ["boil an egg", "the capital", "a train", "soft yolk", "cold water", "the north"]
PROMPTS = prompts_of(*TEXTS)
HELD_OUT = prompts_of("the journey", "thank you")
MIXED = TrainingSection(precision="mixed", zero_stage=1, tokens_per_micro_batch=128)
Records = tuple[list[EvalRecord], list[EvalRecord]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


def online_loop(
    model: ModelSection,
    folder: Path,
    section: OnlineSection,
    progress: Progress | None = None,
    training: TrainingSection = EXACT,
    every: int | None = None,
    interrupt: Event | None = None,
    num_prompts: int = len(TEXTS),
    num_engines: int = 1,
) -> OnlineLoop:
    run = stage_run(folder, progress, every, interrupt)
    rewards = [(each, None) for each in section.rewards]
    assert all(isinstance(each, FunctionReward) for each, _ in rewards)
    return OnlineLoop(
        section=section,
        sync=SyncSection(verify_first=2, verify_every=2),
        roles=online_roles(section, model, run.folder.rollouts, rewards, training, num_engines),
        prompts=PROMPTS.select(range(num_prompts)),
        held_out=HELD_OUT,
        run=run,
        starts_at_reference=True,
    )


def train(loop: OnlineLoop) -> Records:
    try:
        return loop.train()
    finally:
        loop.run.close()


def policy_of(loop: OnlineLoop) -> LocalPolicy:
    assert isinstance(loop.roles.policy, LocalPolicy)
    return loop.roles.policy


def weights(loop: OnlineLoop) -> dict[str, np.ndarray]:
    critic = loop.roles.critic
    assert isinstance(critic, LocalCritic)
    return {
        **{f"policy.{name}": value for name, value in weights_of(policy_of(loop).worker).items()},
        **{f"critic.{name}": value for name, value in weights_of(critic.worker).items()},
    }


def assert_same_run(resumed: OnlineLoop, whole: OnlineLoop) -> None:
    """Weights, metrics and lineage, to the last bit."""
    ours, theirs = weights(resumed), weights(whole)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert logged(resumed.run.folder.path) == logged(whole.run.folder.path)
    for step in range(whole.section.num_steps):
        pair = [read_lineage(lineage_path(loop.run.folder.rollouts, step)) for loop in (resumed, whole)]
        assert pair[0] == pair[1]


FULL = {
    "num_steps": 5,
    "normalize_rewards": True,
    "kl_target": 0.5,
    "kl_horizon": 20,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "temperature": 0.9,
    "eval_every": 2,
}


@pytest.mark.parametrize(
    ("stop_after", "training"), [(2, EXACT), (3, MIXED)], ids=["float32", "mixed, at the end of an epoch"]
)
def test_interrupted_and_resumed(
    model: ModelSection, tmp_path: Path, stop_after: int, training: TrainingSection
) -> None:
    """6 prompts, 2 a step: after step 3 the cursor stands at the boundary of an epoch."""
    section = online_section(**FULL)
    whole = online_loop(model, tmp_path / "whole", section, training=training)
    records = train(whole)
    interrupt = Event()
    watcher = Watcher(stop_after, interrupt.set)
    first = online_loop(model, tmp_path / "stopped", section, watcher, training=training, interrupt=interrupt)
    with pytest.raises(Interrupted, match=f"stopped after step {stop_after}"):
        train(first)
    resumed = online_loop(model, tmp_path / "stopped", section, training=training)
    assert train(resumed) == records
    assert policy_of(resumed).published == list(range(stop_after, 6)), "published before the first rollout"
    assert_same_run(resumed, whole)
    log = logged(tmp_path / "whole")
    assert len(log) == 5
    assert [index for index, row in enumerate(log) if "eval/reward/vowels" in row] == [1, 3]


def test_a_power_cut_costs_the_steps_since_the_checkpoint(model: ModelSection, tmp_path: Path) -> None:
    section = online_section(num_steps=4)
    whole = online_loop(model, tmp_path / "whole", section)
    records = train(whole)
    with pytest.raises(PowerCut):
        train(online_loop(model, tmp_path / "cut", section, Watcher(4, cut_power), every=3))
    resumed = online_loop(model, tmp_path / "cut", section, every=3)
    assert train(resumed) == records
    assert_same_run(resumed, whole)


def test_the_number_of_engines_does_not_matter(model: ModelSection, tmp_path: Path) -> None:
    """Prompts are dealt out to two engines; every sample has its own seed."""
    section = online_section(num_steps=2)
    one = online_loop(model, tmp_path / "one", section)
    train(one)
    two = online_loop(model, tmp_path / "two", section, num_engines=2)
    train(two)
    for step in range(2):
        a, b = (read_lineage(lineage_path(loop.run.folder.rollouts, step)) for loop in (one, two))
        assert [sample.response_ids for sample in a] == [sample.response_ids for sample in b]


def test_another_dataset_is_refused(model: ModelSection, tmp_path: Path) -> None:
    section = online_section(num_steps=2)
    with pytest.raises(PowerCut):
        train(online_loop(model, tmp_path, section, Watcher(2, cut_power), every=1))
    with pytest.raises(CheckpointError, match="6 usable rows, and now there are 5"):
        train(online_loop(model, tmp_path, section, every=1, num_prompts=5))


def test_first_step_metrics_and_those_that_people_watch(model: ModelSection, tmp_path: Path) -> None:
    loop = online_loop(model, tmp_path, online_section(num_steps=2))
    train(loop)
    first, second = logged(tmp_path)
    assert first["kl/per_token"] == 0.0, "policy and reference are the same model"
    assert first["policy/ratio"] == first["policy/ratio_max"] == 1.0
    assert first["kl/coef"] == 0.05
    assert first["mismatch/logprob_diff_max"] < 1e-4, "trainer and engine hold the same weights"
    assert second["mismatch/logprob_diff_max"] < 1e-4
    assert second["kl/per_token"] != 0.0
    assert first["sync/probe_mean"] < 1e-5
    for name in (
        *("policy/loss", "policy/clip_ratio/low", "policy/clip_ratio/high", "policy/approx_kl_k1"),
        *("policy/approx_kl_k3", "policy/entropy", "policy/grad_norm", "policy/learning_rate"),
        *("critic/loss", "critic/explained_variance", "critic/clip_fraction", "critic/value_mean"),
        *("critic/return_mean", "critic/grad_norm", "critic/learning_rate"),
        *("reward/mean", "reward/std", "reward/vowels/mean", "reward/score", "reward/kl_penalty"),
        *("length/mean", "length/max", "length/truncated_fraction", "mismatch/kl", "kl/per_sequence"),
    ):
        assert np.isfinite(first[name]), name


def test_each_step_has_its_own_samples(model: ModelSection, tmp_path: Path) -> None:
    """Also when a prompt comes again: 2 prompts, 2 a step, and weights that hardly move."""
    section = online_section(num_steps=2, optimizer={"learning_rate": 1e-9})
    loop = online_loop(model, tmp_path, section, num_prompts=2)
    train(loop)
    first, second = (read_lineage(lineage_path(loop.run.folder.rollouts, step)) for step in (0, 1))
    answers = [{(s.prompt_id, s.response_ids) for s in samples} for samples in (first, second)]
    assert len(answers[0]) == len(answers[1]) == 4, "samples of a prompt differ"
    assert not answers[0] & answers[1]


def test_critic_warm_up_leaves_the_policy_alone(model: ModelSection, tmp_path: Path) -> None:
    section = online_section(num_steps=3, critic_warmup_steps=2)
    seen: list[dict[str, np.ndarray]] = []
    loops: list[OnlineLoop] = []
    watcher = Watcher(2, lambda: seen.append(weights(loops[0])))
    loops.append(online_loop(model, tmp_path, section, watcher))
    before = weights(loops[0])
    train(loops[0])
    (warm,) = seen
    after = weights(loops[0])
    policy = [name for name in before if name.startswith("policy.")]
    critic = [name for name in before if name.startswith("critic.")]
    assert all(np.array_equal(warm[name], before[name]) for name in policy)
    assert any(not np.array_equal(warm[name], before[name]) for name in critic)
    assert any(not np.array_equal(after[name], warm[name]) for name in policy)
    assert ["policy/loss" in row for row in logged(tmp_path)] == [False, False, True]


def test_kl_coefficient_follows_the_target(model: ModelSection, tmp_path: Path) -> None:
    """Ziegler et al. 2019, section 2.2, from the KL that each step logged."""
    section = online_section(num_steps=4, kl_coef=0.2, kl_target=0.5, kl_horizon=20)
    train(online_loop(model, tmp_path, section))
    log = logged(tmp_path)
    coef = 0.2
    for row in log:
        assert row["kl/coef"] == pytest.approx(coef, rel=1e-12)
        error = np.clip(row["kl/per_sequence"] / 0.5 - 1, -0.2, 0.2)
        coef *= 1 + error * 4 / 20
    assert log[1]["kl/coef"] == pytest.approx(0.2 * (1 - 0.2 * 4 / 20)), "the first KL is 0, below the target"


def test_an_engine_that_missed_an_update_is_found(model: ModelSection, tmp_path: Path) -> None:
    section = online_section(num_steps=3)
    loops: list[OnlineLoop] = []

    def forget_second_engine() -> None:
        policy_of(loops[0]).engines = policy_of(loops[0]).engines[:1]

    watcher = Watcher(1, forget_second_engine)
    loops.append(online_loop(model, tmp_path, section, watcher, num_engines=2))
    with pytest.raises(WeightSyncError, match="weights of version 1, 2, and version 2 was published last"):
        train(loops[0])


def test_a_reference_that_is_not_the_policy_is_found(model: ModelSection, tmp_path: Path) -> None:
    other = ModelSection(path=str(tiny_model_folder(tmp_path / "other", seed=1)))
    loop = online_loop(model, tmp_path / "run", online_section(num_steps=1))
    foreign = online_loop(other, tmp_path / "foreign", online_section(num_steps=1))
    object.__setattr__(loop.roles, "reference", foreign.roles.reference)
    with pytest.raises(RlhfRayError, match=r"KL to the reference is .* before the first update"):
        train(loop)


def test_reward_goes_up(model: ModelSection, tmp_path: Path) -> None:
    """Twelve steps towards more vowels, with all that PPO has."""
    section = online_section(
        num_steps=12,
        prompts_per_step=6,
        num_generations=4,
        num_ppo_epochs=2,
        num_mini_batches=2,
        kl_coef=0.01,
        optimizer={"learning_rate": 2e-3},
        critic_optimizer={"learning_rate": 3e-3},
    )
    train(online_loop(model, tmp_path, section))
    rewards = [float(row["reward/mean"]) for row in logged(tmp_path)]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 1.0


def test_means_leave_out_what_was_not_said() -> None:
    records = [
        EvalRecord(
            0, "p", "r", {"a": 1.0, "b": float("nan"), "c": float("nan")}, kl=1.0, length=3, finished=True
        ),
        EvalRecord(1, "p", "r", {"a": 2.0, "b": 5.0, "c": float("nan")}, kl=3.0, length=5, finished=False),
    ]
    assert evaluation_means(records) == {
        "eval/reward/a": 1.5,
        "eval/reward/b": 5.0,
        "eval/kl": 2.0,
        "eval/length": 4.0,
    }
