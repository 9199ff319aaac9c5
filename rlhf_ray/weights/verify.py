"""Does the engine hold the weights that the trainer published? Asked of the log-probs of fixed probe
sequences.

Write t for the trainer's log-probs of the N probe tokens and e for the engine's; t' and e' for both at an
earlier, verified publication. The two sides compute one function with different kernels and roundings, so
they differ by some noise even when all is well; s is the root mean square of e' - t'. Two checks:

1. Agreement: mean |e - t| <= tolerance. Catches wrong, missing and half-loaded weights.
2. Following: a small optimizer step hides inside the tolerance, and an engine that never received it hides
   with it. Let d = t - t' be how the trainer's log-probs moved and m = e - e' how the engine's did, and
   f = <m, d> / <d, d> the least-squares share of the movement that the engine followed. A stale engine has
   m = noise, so f = 0 on average. A fresh one moved as the trainer truly did; d has the trainer's own
   rounding noise in it, whose variance is at most 2 s^2, so f is on average at least
   g = 1 - 2 s^2 / mean(d^2) (regression dilution; Fuller 1987, section 1.1). The standard error of f is at
   most sqrt(2) s / |d|. Where g / 2 is `SEPARATION` standard errors or more, f < g / 2 means stale. A shorter
   movement cannot be told from noise; that is no alarm, and since `ProbeHistory` keeps its earlier probe
   until a check could tell, the movement adds up over steps until one can.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.errors import WeightSyncError
from rlhf_ray.types import Metrics, Ragged

SEPARATION = 5.0
"""Standard errors. Under Gaussian noise a false alarm has a probability of 3e-7; real tails are heavier."""

ROUNDING = 1e-5
"""Nats. Two float32 evaluations of one log-prob differ by about this much, whatever was last measured."""

STALE = "the engine still samples with earlier weights"
_CAUSES = (
    "Likely causes: the engine missed the update, a tied output head was not rebuilt, only part of the "
    "parameters was sent, or the engine loads another model than the trainer trains."
)


@dataclass(frozen=True)
class Probe:
    """Log-probs of the same tokens under the same version by both sides.

    Fields: engine, trainer: one row a probe sequence, one value a token after the first, natural logarithm,
    temperature 1.
    """

    engine: Ragged
    trainer: Ragged

    def __post_init__(self) -> None:
        if not np.array_equal(self.engine.lengths, self.trainer.lengths):
            raise WeightSyncError(
                f"probe: the engine scored rows of {self.engine.lengths.tolist()} tokens, the trainer rows "
                f"of {self.trainer.lengths.tolist()}"
            )
        for side, logprobs in (("engine", self.engine), ("trainer", self.trainer)):
            unusable = np.flatnonzero(~np.isfinite(_exact(logprobs)))
            if len(unusable):
                raise WeightSyncError(
                    f"probe: the {side}'s log-prob is {logprobs.values[unusable[0]]} "
                    f"at {_where(logprobs, int(unusable[0]))}"
                )

    @property
    def difference(self) -> NDArray[np.float64]:
        """[N] engine minus trainer."""
        return _exact(self.engine) - _exact(self.trainer)


@dataclass(frozen=True)
class ProbeReport:
    """What a comparison found.

    Fields:
        mean, max: of |engine - trainer|, nats a token.
        moved: root mean square of the trainer's movement since the earlier probe, nats a token; 0 without
            one.
        followed: share of that movement that the engine's log-probs made too: 0 for a stale engine, near 1
            for a fresh one; None where the movement is too short to tell.
    """

    mean: float
    max: float
    moved: float
    followed: float | None

    def metrics(self) -> Metrics:
        metrics = {"sync/probe_mean": self.mean, "sync/probe_max": self.max, "sync/probe_moved": self.moved}
        if self.followed is not None:
            metrics["sync/probe_followed"] = self.followed
        return metrics


def compare_probe(current: Probe, previous: Probe | None, tolerance: float) -> ProbeReport:
    """Compare the engine's log-probs with the trainer's after a publication.

    Args:
        current: both sides now.
        previous: both sides at an earlier publication that passed, on the same sequences; None at the first.
        tolerance: largest accepted mean |engine - trainer|, nats a token.

    Raises:
        WeightSyncError: the engine does not hold the published weights.
    """
    absolute = np.abs(current.difference)
    mean, worst = float(absolute.mean()), float(absolute.max())
    if mean > tolerance:
        raise WeightSyncError(f"{_compared(current)}, more than sync.tolerance={tolerance:g}. {_CAUSES}")
    if previous is None:
        return ProbeReport(mean, worst, moved=0.0, followed=None)
    moved, followed, least = _following(current, previous)
    if least is None:
        return ProbeReport(mean, worst, moved, followed=None)
    if followed < least:
        raise WeightSyncError(
            f"{STALE}: since the last check the trainer's log-probs moved by {moved:.2g} nats a token (root "
            f"mean square) and the engine's followed {followed:.0%} of that, {least:.0%} being the least "
            f"that noise explains. {_compared(current)}. {_CAUSES}"
        )
    return ProbeReport(mean, worst, moved, followed)


class ProbeHistory:
    """Compares each publication's probe with the last one from which the engine's following could be told."""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._previous: Probe | None = None

    def check(self, current: Probe) -> ProbeReport:
        """Raises: WeightSyncError as `compare_probe` does."""
        report = compare_probe(current, self._previous, self._tolerance)
        if self._previous is None or report.followed is not None:
            self._previous = current
        return report


def _following(current: Probe, previous: Probe) -> tuple[float, float, float | None]:
    """(rms of the trainer's movement, followed share f, least share g / 2 or None if noise hides it)."""
    if not np.array_equal(current.trainer.lengths, previous.trainer.lengths):
        raise WeightSyncError("probe: the earlier log-probs are of other sequences than the current ones")
    trainer = _exact(current.trainer) - _exact(previous.trainer)
    engine = _exact(current.engine) - _exact(previous.engine)
    moved = float(np.sqrt(np.mean(trainer**2)))
    noise = max(float(np.sqrt(np.mean(previous.difference**2))), ROUNDING)
    if moved**2 <= 2 * noise**2:
        return moved, 0.0, None
    followed = float(engine @ trainer) / float(trainer @ trainer)
    least = (1 - 2 * noise**2 / moved**2) / 2
    standard_error = np.sqrt(2) * noise / (moved * np.sqrt(len(trainer)))
    return moved, followed, least if least >= SEPARATION * standard_error else None


def _compared(probe: Probe) -> str:
    absolute = np.abs(probe.difference)
    worst = int(absolute.argmax())
    return (
        f"the log-probs of {len(absolute)} probe tokens differ between engine and trainer by "
        f"{absolute.mean():.3g} nats a token on average, worst at {_where(probe.engine, worst)}: engine "
        f"{probe.engine.values[worst]:.4f}, trainer {probe.trainer.values[worst]:.4f}"
    )


def _exact(logprobs: Ragged) -> NDArray[np.float64]:
    return logprobs.values.astype(np.float64)


def _where(rows: Ragged, flat: int) -> str:
    row = int(rows.row_ids[flat])
    return f"sequence {row}, token {flat - int(rows.offsets[row]) + 1}"
