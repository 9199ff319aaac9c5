"""From scores to a training batch: two rows by hand, and what must not matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.config.schema import ModelSection, OnlineSection
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.reporting.lineage import lineage_path, read_lineage
from rlhf_ray.types import Metrics, Ragged, RLBatch, Rollouts, Scores, StepInfo
from rlhf_ray.workers.experience import ExperienceWorker
from tests.local_roles import online_section
from tests.samples import random_rollouts, rollouts_of
from tests.tiny import tiny_model_folder

HAND = {
    "gamma": 0.9,
    "lam": 0.5,
    "kl_coef": 0.1,
    "missing_eos_penalty": 1.0,
    "reward_clip": 2.0,
    "whiten_advantages": False,
}
ROLLOUTS = rollouts_of(
    [[1, 30], [1, 31]], [[40, 2], [50]], finished=[True, False], prompt_ids=[4, 9], version=3
)
SCORES = Scores(np.array([3.0, 0.5], np.float32), {"gold": np.array([3.0, np.nan], np.float32)})


def per_token(*rows: list[float]) -> Ragged:
    return Ragged.from_rows(rows, np.float32)


OLD = per_token([-1.0, -2.0], [-3.0])
REF = per_token([-1.5, -1.0], [-3.0])
VALUES = per_token([0.5, 1.0], [0.25])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


def worker(model: ModelSection, folder: Path, section: OnlineSection) -> ExperienceWorker:
    return ExperienceWorker(section, model, folder)


def prepare(
    experience: ExperienceWorker, kl_coef: float = 0.1, scores: Scores = SCORES, step: int = 3
) -> tuple[RLBatch, Metrics]:
    return experience.prepare(StepInfo(step, 3, kl_coef), 1, OLD, VALUES, ROLLOUTS, scores, REF)


def test_two_rows_by_hand(model: ModelSection, tmp_path: Path) -> None:
    """Row 0: score 3 clipped to 2, k1 = (0.5, -1). Row 1: score 0.5 less 1 for the missing EOS, k1 = 0.

    Rewards are (-0.05, 2 + 0.1) and (-0.5). A_1 = 2.1 - 1 = 1.1 and A_0 = -0.05 + 0.9 * 1 - 0.5 + 0.45 * 1.1
    = 0.845; in row 1, -0.5 - 0.25 = -0.75.
    """
    batch, metrics = prepare(worker(model, tmp_path, online_section(**HAND)))
    np.testing.assert_allclose(batch.advantages.values, [0.845, 1.1, -0.75], rtol=1e-6)
    np.testing.assert_allclose(batch.returns.values, [1.345, 2.1, -0.5], rtol=1e-6)
    assert batch.is_trained.values.tolist() == [True, True, True]
    assert batch.advantages.lengths.tolist() == batch.returns.lengths.tolist() == [2, 1]
    assert batch.prompt_ids.tolist() == [4, 9]
    for name in ("old_logprobs", "ref_logprobs", "values", "advantages", "returns"):
        assert getattr(batch, name).values.dtype == np.float32, name
    expected = {
        "reward/mean": 1.75,
        "reward/std": 1.25,
        "reward/score": (2.0 - 0.5) / 2,
        "reward/kl_penalty": (0.05 - 0.1) / 2,
        "reward/shaped": (2.05 - 0.5) / 2,
        "reward/gold/mean": 3.0,
        "reward/gold/std": 0.0,
        "kl/per_token": -0.5 / 3,
        "kl/per_sequence": -0.5 / 2,
        "length/mean": 1.5,
        "length/max": 2.0,
        "length/truncated_fraction": 0.5,
        "length/stop_fraction": 0.5,
        "length/reward_correlation": 1.0,
        "perf/num_samples": 2.0,
        "perf/generated_tokens": 3.0,
        # The sampler said -1 for every token.
        "mismatch/logprob_diff_mean": (0 + 1 + 2) / 3,
        "mismatch/logprob_diff_max": 2.0,
        "mismatch/ratio_min": np.exp(-2.0),
        "mismatch/ratio_max": 1.0,
        "mismatch/fraction_masked": 0.0,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name
    assert "reward/frac_zero_std" not in metrics, "no prompt has two samples"


def test_kl_in_the_loss_is_not_in_the_reward(model: ModelSection, tmp_path: Path) -> None:
    options = {**HAND, "kl_placement": "loss", "kl_estimator": "k3"}
    batch, metrics = prepare(worker(model, tmp_path, online_section(**options)))
    # Rewards (0, 2) and (-0.5): A_1 = 1, A_0 = 0.9 - 0.5 + 0.45.
    np.testing.assert_allclose(batch.advantages.values, [0.85, 1.0, -0.75], rtol=1e-6)
    assert metrics["reward/kl_penalty"] == 0.0
    assert metrics["kl/per_sequence"] == pytest.approx(-0.25)


def test_the_steps_own_coefficient_counts(model: ModelSection, tmp_path: Path) -> None:
    """Not the section's, which is only where an adaptive one starts."""
    batch, _ = prepare(worker(model, tmp_path, online_section(**HAND)), kl_coef=0.0)
    np.testing.assert_allclose(batch.returns.values[1:], [2.0, -0.5], rtol=1e-6)


def test_whitened_advantages_by_hand(model: ModelSection, tmp_path: Path) -> None:
    batch, _ = prepare(worker(model, tmp_path, online_section(**{**HAND, "whiten_advantages": True})))
    raw = np.array([0.845, 1.1, -0.75])
    expected = (raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(batch.advantages.values, expected, rtol=1e-5)
    np.testing.assert_allclose(batch.returns.values, [1.345, 2.1, -0.5], rtol=1e-6, err_msg="returns are not")


def test_whitened_rewards_by_hand(model: ModelSection, tmp_path: Path) -> None:
    """Scaled to unit variance over all tokens; the mean stays."""
    options = {**HAND, "whiten_rewards": True, "gamma": 1.0, "lam": 1.0}
    batch, _ = prepare(worker(model, tmp_path, online_section(**options)))
    raw = np.array([-0.05, 2.1, -0.5])
    white = (raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8) + raw.mean()
    np.testing.assert_allclose(batch.returns.values, [white[0] + white[1], white[1], white[2]], rtol=1e-5)


def test_normalised_rewards_use_all_that_was_seen(model: ModelSection, tmp_path: Path) -> None:
    options = {**HAND, "normalize_rewards": True, "reward_clip": None, "kl_coef": 0.0}
    section = online_section(**options)
    experience = worker(model, tmp_path, section)
    second = Scores(np.array([-1.0, 6.0], np.float32), {})
    prepare(experience, kl_coef=0.0)
    state = experience.state_dict()
    batch, _ = prepare(experience, kl_coef=0.0, scores=second, step=4)
    std = np.std([3.0, 0.5, -1.0, 6.0], ddof=1)
    np.testing.assert_allclose(batch.returns.values[1:], [-1 / std, 6 / std - 1], rtol=1e-5)

    resumed = worker(model, tmp_path, section)
    resumed.load_state_dict(state)
    again, _ = prepare(resumed, kl_coef=0.0, scores=second, step=4)
    assert np.array_equal(again.returns.values, batch.returns.values)


LENGTHS = [(3, 5), (2, 1), (6, 9), (4, 2), (5, 7), (1, 3)]


def random_parts(seed: int = 0) -> tuple[Rollouts, Scores, Ragged, Ragged, Ragged]:
    """Rollouts of three prompts with two samples each, scores, reference, old log-probs, values."""
    rollouts = random_rollouts(LENGTHS, seed)
    object.__setattr__(rollouts, "prompt_ids", np.array([0, 0, 1, 1, 2, 2]))
    generator = np.random.default_rng(seed)
    total = generator.standard_normal(6).astype(np.float32)
    columns = generator.standard_normal((3, len(rollouts.responses.values))).astype(np.float32)
    return rollouts, Scores(total, {"gold": total * 2}), *[rollouts.responses.with_values(c) for c in columns]


def in_chunks(
    experience: ExperienceWorker, cuts: list[list[int]], seed: int = 0, order: list[int] | None = None
) -> tuple[RLBatch, Metrics]:
    rollouts, scores, ref, old, values = random_parts(seed)
    order = order or list(range(6))
    chosen = [[order[row] for row in rows] for rows in cuts]
    parts = [
        *[rollouts.select(rows) for rows in chosen],
        *[Scores(scores.total[rows], {"gold": scores.parts["gold"][rows]}) for rows in chosen],
        *[ref.select(rows) for rows in chosen],
    ]
    return experience.prepare(StepInfo(0, 0, 0.1), len(cuts), old.select(order), values.select(order), *parts)


@pytest.mark.parametrize("whiten", [False, True])
def test_the_cut_into_chunks_does_not_matter(model: ModelSection, tmp_path: Path, whiten: bool) -> None:
    section = online_section(whiten_rewards=whiten)
    whole, metrics = in_chunks(worker(model, tmp_path, section), [[0, 1, 2, 3, 4, 5]])
    cut, cut_metrics = in_chunks(worker(model, tmp_path, section), [[0, 1], [2], [3, 4, 5]])
    assert np.array_equal(cut.advantages.values, whole.advantages.values)
    assert np.array_equal(cut.returns.values, whole.returns.values)
    assert np.array_equal(cut.ref_logprobs.values, whole.ref_logprobs.values)
    assert cut_metrics == metrics


def test_rows_do_not_leak_into_each_other(model: ModelSection, tmp_path: Path) -> None:
    """Another order of the rows gives the same numbers in that order."""
    section = online_section(whiten_advantages=False)
    order = [4, 0, 5, 2, 3, 1]
    plain, _ = in_chunks(worker(model, tmp_path, section), [[0, 1, 2, 3, 4, 5]])
    mixed, _ = in_chunks(worker(model, tmp_path, section), [[0, 1, 2, 3, 4, 5]], order=order)
    np.testing.assert_allclose(mixed.advantages.values, plain.advantages.select(order).values, rtol=1e-6)


def test_tokens_of_other_weights_are_refused(model: ModelSection, tmp_path: Path) -> None:
    experience = worker(model, tmp_path, online_section())
    with pytest.raises(
        WeightSyncError, match=r"step 4: .* weights of version 3, and version 4 was published"
    ):
        experience.prepare(StepInfo(4, 4, 0.1), 1, OLD, VALUES, ROLLOUTS, SCORES, REF)
    mixed = ROLLOUTS.versions.with_values(np.array([4, 4, -1], dtype=np.int32))
    object.__setattr__(half := rollouts_of([[1], [1]], [[40, 2], [50]]), "versions", mixed)
    with pytest.raises(WeightSyncError, match="version -1, 4, and version 4"):
        experience.prepare(StepInfo(4, 4, 0.1), 1, OLD, VALUES, half, SCORES, REF)
    assert not lineage_path(tmp_path, 4).exists()


def test_lineage_of_every_sample(model: ModelSection, tmp_path: Path) -> None:
    batch, _ = prepare(worker(model, tmp_path, online_section(**HAND)))
    first, second = read_lineage(lineage_path(tmp_path, 3))
    assert (first.step, first.prompt_id, first.sample_id) == (3, 4, 0)
    assert (first.response_ids, first.finish_reason) == ((40, 2), "stop")
    assert (second.response_ids, second.finish_reason) == ((50,), "length")
    assert (first.version_min, first.version_max) == (3, 3)
    assert (first.prompt, second.prompt) == ("question 4", "question 9")
    assert "<|im_end|>" not in first.response
    assert first.reward_parts == {"gold": 3.0}
    assert np.isnan(second.reward_parts["gold"])
    assert (first.reward, second.reward) == (3.0, 0.5)
    assert (first.kl, second.kl) == pytest.approx((-0.5, 0.0))
    assert first.advantage == pytest.approx((0.845 + 1.1) / 2)
    assert len(batch) == 2


def test_a_source_without_any_value_has_no_metrics(model: ModelSection, tmp_path: Path) -> None:
    silent = Scores(SCORES.total, {"gold": np.full(2, np.nan, np.float32)})
    _, metrics = prepare(worker(model, tmp_path, online_section()), scores=silent)
    assert not [name for name in metrics if name.startswith("reward/gold")]
    assert np.isfinite(list(metrics.values())).all()


def test_samples_that_a_source_failed_on_are_not_trained_on(model: ModelSection, tmp_path: Path) -> None:
    failed = Scores(
        SCORES.total,
        SCORES.parts,
        is_valid=np.array([False, True]),
        spreads={"gold": np.array([0.5, np.nan], np.float32)},
        events={"reward/gold/failures": 1.0},
    )
    batch, metrics = prepare(worker(model, tmp_path, online_section()), scores=failed)
    assert batch.is_trained.values.tolist() == [False, False, True]
    assert metrics["reward/gold/failures"] == 1.0
    assert metrics["reward/gold/spread"] == 0.5


def test_groups_without_signal_are_counted(model: ModelSection, tmp_path: Path) -> None:
    rollouts, _, ref, old, values = random_parts()
    scores = Scores(np.array([1, 1, 0, 2, 3, 3], np.float32), {})
    _, metrics = worker(model, tmp_path, online_section()).prepare(
        StepInfo(0, 0, 0.1), 1, old, values, rollouts, scores, ref
    )
    assert metrics["reward/frac_zero_std"] == pytest.approx(2 / 3)


def test_judgement_of_held_out_answers(model: ModelSection, tmp_path: Path) -> None:
    records = worker(model, tmp_path, online_section()).evaluate(OLD, ROLLOUTS, SCORES, REF)
    assert [record.prompt_id for record in records] == [4, 9]
    assert [record.kl for record in records] == pytest.approx([-0.5, 0.0])
    assert [record.length for record in records] == [2, 1]
    assert [record.finished for record in records] == [True, False]
    assert records[0].rewards == {"gold": 3.0}
    assert np.isnan(records[1].rewards["gold"])
    assert not list(tmp_path.iterdir()), "no lineage: nothing is trained on"
