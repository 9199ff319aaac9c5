"""The probe comparison: hand-computed cases, and its error rates under simulated noise."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from rlhf_ray.errors import WeightSyncError
from rlhf_ray.types import Ragged
from rlhf_ray.weights.verify import Probe, ProbeHistory, compare_probe

LENGTHS = [40] * 8
NUM_TOKENS = sum(LENGTHS)
BF16_NOISE = 0.015
TRIALS = 400


def ragged(values: NDArray[np.float64]) -> Ragged:
    return Ragged.from_lengths(values.astype(np.float32), LENGTHS)


def rows(*values: list[float]) -> Ragged:
    return Ragged.from_rows(values, np.float32)


def heavy_tailed(rng: np.random.Generator, scale: float) -> NDArray[np.float64]:
    """Noise of the given root mean square; one token in ten has three times the spread of the rest."""
    spread = np.where(rng.random(NUM_TOKENS) < 0.1, 3.0, 1.0)
    return scale / np.sqrt(0.9 + 0.1 * 9) * spread * rng.standard_normal(NUM_TOKENS)


def publication(
    rng: np.random.Generator,
    engine: NDArray[np.float64],
    trainer: NDArray[np.float64],
    noise: tuple[float, float],
) -> Probe:
    """Both sides' log-probs of their weights, each with its own noise (engine, trainer)."""
    return Probe(ragged(engine + heavy_tailed(rng, noise[0])), ragged(trainer + heavy_tailed(rng, noise[1])))


def test_report_of_a_hand_computed_case() -> None:
    previous = Probe(rows([-1.0, -2.0], [-3.0]), rows([-1.0, -2.0], [-3.0]))
    # The trainer moved by (0.3, 0, -0.4), the engine by (0.3, 0, -0.3).
    current = Probe(rows([-0.7, -2.0], [-3.3]), rows([-0.7, -2.0], [-3.4]))
    report = compare_probe(current, previous, tolerance=0.06)
    assert report.mean == pytest.approx(0.1 / 3, rel=1e-4)
    assert report.max == pytest.approx(0.1, rel=1e-4)
    assert report.moved == pytest.approx(np.sqrt(0.25 / 3), rel=1e-4)
    assert report.followed == pytest.approx((0.09 + 0.12) / 0.25, rel=1e-4)
    assert report.metrics()["sync/probe_followed"] == report.followed


def test_disagreement_names_the_size_and_the_worst_token() -> None:
    current = Probe(rows([-1.0, -2.0], [-3.0, -1.0]), rows([-1.0, -2.1], [-3.0, -2.5]))
    with pytest.raises(WeightSyncError) as caught:
        compare_probe(current, None, tolerance=0.06)
    message = str(caught.value)
    assert "4 probe tokens" in message and "by 0.4 nats" in message and "sync.tolerance=0.06" in message
    assert "sequence 1, token 2: engine -1.0000, trainer -2.5000" in message
    assert "tied output head" in message


def test_other_rows_and_nan_are_errors_and_not_differences() -> None:
    with pytest.raises(WeightSyncError, match=r"\[2\].*\[1\]"):
        Probe(rows([-1.0, -1.0]), rows([-1.0]))
    with pytest.raises(WeightSyncError, match=r"engine's log-prob is nan at sequence 1, token 1"):
        Probe(rows([-1.0], [np.nan]), rows([-1.0], [-1.0]))
    previous = Probe(rows([-1.0, -1.0]), rows([-1.0, -1.0]))
    with pytest.raises(WeightSyncError, match="other sequences"):
        compare_probe(Probe(rows([-1.0]), rows([-1.0])), previous, 0.06)


@pytest.mark.parametrize("step", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 6.0])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["engine-noise", "both", "trainer-noise"])
def test_no_false_alarm_at_the_noise_of_a_bfloat16_engine(step: float, share: float) -> None:
    """`step`: true movement in units of the mismatch; `share`: how much of that is the trainer's rounding."""
    rng = np.random.default_rng(7)
    noise = (BF16_NOISE * np.sqrt(1 - share), BF16_NOISE * np.sqrt(share))
    for _ in range(TRIALS):
        old = -rng.exponential(2.0, NUM_TOKENS)
        new = old + step * BF16_NOISE * rng.standard_normal(NUM_TOKENS)
        previous = publication(rng, old, old, noise)
        compare_probe(publication(rng, new, new, noise), previous, tolerance=0.06)


@pytest.mark.parametrize("engine_is_deterministic", [True, False])
def test_a_stale_engine_is_caught_although_the_step_hides_inside_the_tolerance(
    engine_is_deterministic: bool,
) -> None:
    rng = np.random.default_rng(3)
    noise = (BF16_NOISE / np.sqrt(2), BF16_NOISE / np.sqrt(2))
    for _ in range(TRIALS):
        old = -rng.exponential(2.0, NUM_TOKENS)
        new = old + 2.5 * BF16_NOISE * rng.standard_normal(NUM_TOKENS)
        previous = publication(rng, old, old, noise)
        current = publication(rng, old, new, noise)
        if engine_is_deterministic:
            current = Probe(previous.engine, current.trainer)
        assert np.abs(current.difference).mean() < 0.06
        with pytest.raises(WeightSyncError, match=r"earlier weights.*moved by 0\.0"):
            compare_probe(current, previous, tolerance=0.06)


def test_a_step_below_the_noise_is_no_alarm_and_adds_up_until_it_is_one() -> None:
    rng = np.random.default_rng(5)
    noise = (BF16_NOISE / np.sqrt(2), BF16_NOISE / np.sqrt(2))
    history = ProbeHistory(tolerance=0.06)
    old = -rng.exponential(2.0, NUM_TOKENS)
    direction = rng.standard_normal(NUM_TOKENS)
    history.check(publication(rng, old, old, noise))
    for step in range(1, 4):
        report = history.check(publication(rng, old, old + 0.4 * step * BF16_NOISE * direction, noise))
        assert report.followed is None
    with pytest.raises(WeightSyncError, match="earlier weights"):
        for step in range(4, 12):
            history.check(publication(rng, old, old + 0.4 * step * BF16_NOISE * direction, noise))


def test_history_compares_with_the_last_conclusive_check() -> None:
    history = ProbeHistory(tolerance=1.0)
    exact = [Probe(rows([value, value]), rows([value, value])) for value in (-1.0, -2.0, -2.5)]
    assert history.check(exact[0]).followed is None
    assert history.check(exact[1]).moved == pytest.approx(1.0)
    assert history.check(exact[2]).moved == pytest.approx(0.5)


def test_rounding_of_float32_is_not_taken_for_movement() -> None:
    previous = Probe(rows([-1.0] * 50), rows([-1.0] * 50))
    current = Probe(rows([-1.0] * 50), rows([-1.000001] * 50))
    assert compare_probe(current, previous, tolerance=0.06).followed is None
