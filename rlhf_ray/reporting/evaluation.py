"""The policy before and after training on the same held-out prompts, and signs of reward hacking."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from rlhf_ray.errors import DataError
from rlhf_ray.reporting.figures import compact
from rlhf_ray.reporting.files import dump_line, read_lines, write_text
from rlhf_ray.reporting.stats import Estimate, correlation, distinct_n, mean_ci, paired_bootstrap, wilson

KL_LIMIT = 20.0
"""Nats a sequence. A rule of thumb: with KL a gold reward first rises and then falls, the earlier the smaller
the reward model (Gao et al. 2022, figure 1)."""
CORRELATION_LIMIT = 0.5
MIN_FOR_CORRELATION = 16
"""Fewer answers reach a correlation of 0.5 by chance in more than one case of twenty."""
DIVERSITY_LIMIT = 0.7
"""Smallest distinct-2 at the end, as a share of that at the start, that passes without a warning."""


@dataclass(frozen=True)
class EvalRecord:
    """One answer to one held-out prompt.

    Fields:
        prompt_id: the same in the records of start and end.
        rewards: reward source -> unweighted reward; NaN where the source had none to give.
        kl: log pi / pi_ref of the answer, nats a sequence. length: tokens. finished: False where it was cut.
    """

    prompt_id: int
    prompt: str
    response: str
    rewards: dict[str, float]
    kl: float
    length: int
    finished: bool


Pair = tuple[EvalRecord, EvalRecord]
"""Start and end on one prompt."""


class EstimateDict(TypedDict):
    """A mean over n prompts and its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


class Comparison(TypedDict):
    """`difference` is the mean of end - start over prompts."""

    start: EstimateDict
    end: EstimateDict
    difference: EstimateDict


class RewardComparison(Comparison):
    """`win_rate` is the share of prompts where the end is better than the start, ties counted half."""

    trained: bool
    win_rate: EstimateDict


class Summary(TypedDict):
    """What `summarise` returns.

    prompts: held-out prompts that both were measured on; unpaired: records that are in one of them alone.
    distinct_2: start and end, on equal amounts of text. length_correlation: of reward and length, at the end.
    """

    prompts: int
    unpaired: int
    rewards: dict[str, RewardComparison]
    kl: Comparison
    length: Comparison
    truncated: Comparison
    distinct_2: dict[str, float]
    length_correlation: dict[str, float]
    warnings: list[str]


def pair_records(start: Sequence[EvalRecord], end: Sequence[EvalRecord]) -> list[Pair]:
    """Records of the same prompt, in the order of `end`."""
    by_id = {record.prompt_id: record for record in start}
    if len(by_id) < len(start) or len({record.prompt_id for record in end}) < len(end):
        raise ValueError("several records for one prompt id; evaluate each held-out prompt once")
    return [(by_id[record.prompt_id], record) for record in end if record.prompt_id in by_id]


def summarise(
    start: Sequence[EvalRecord],
    end: Sequence[EvalRecord],
    *,
    watched: Iterable[str] = (),
    kl_limit: float = KL_LIMIT,
) -> Summary:
    """Compare end with start.

    Args:
        watched: reward sources that are not trained on: gold scores.
        kl_limit: nats a sequence above which the KL to the reference is warned of.
    """
    pairs = pair_records(start, end)
    watched = frozenset(watched)
    sources = list(dict.fromkeys(name for pair in pairs for record in pair for name in record.rewards))
    summary = Summary(
        prompts=len(pairs),
        unpaired=len(start) + len(end) - 2 * len(pairs),
        rewards={name: _compare_reward(pairs, name, name not in watched) for name in sources},
        kl=_compare([(a.kl, b.kl) for a, b in pairs]),
        length=_compare([(a.length, b.length) for a, b in pairs]),
        truncated=_compare_shares([(not a.finished, not b.finished) for a, b in pairs]),
        distinct_2=_distinct_2(pairs),
        length_correlation={name: _length_correlation(pairs, name) for name in sources},
        warnings=[],
    )
    summary["warnings"] += [
        *_gold_warnings(summary),
        *_length_warnings(summary),
        *_drift_warnings(summary, kl_limit),
    ]
    return summary


def save_records(path: Path, start: Sequence[EvalRecord], end: Sequence[EvalRecord] = ()) -> None:
    """Write `eval.jsonl`; without `end` right after the first evaluation, so that a resumed run has it."""
    lines = [dump_line({"when": "start", **asdict(record)}) for record in start]
    lines += [dump_line({"when": "end", **asdict(record)}) for record in end]
    write_text(path, "".join(lines))


def load_records(path: Path) -> tuple[list[EvalRecord], list[EvalRecord]]:
    """Start and end, from `eval.jsonl`.

    Raises:
        DataError: the file is missing or damaged.
    """
    records: dict[str, list[EvalRecord]] = {"start": [], "end": []}
    for number, row in enumerate(read_lines(path), start=1):
        try:
            when = str(row.pop("when"))
            records[when].append(_record(row))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}:{number}: not an evaluation record ({error!r}); remove the line"
            ) from error
    return records["start"], records["end"]


def _record(row: dict) -> EvalRecord:
    rewards = {name: math.nan if value is None else value for name, value in row.pop("rewards").items()}
    kl = row.pop("kl")
    return EvalRecord(**row, rewards=rewards, kl=math.nan if kl is None else kl)


def known_rewards(pairs: Sequence[Pair], source: str) -> list[tuple[float, float]]:
    """Rewards of the pairs that the source gave one at both ends."""
    both = [(a.rewards.get(source, math.nan), b.rewards.get(source, math.nan)) for a, b in pairs]
    return [(a, b) for a, b in both if math.isfinite(a) and math.isfinite(b)]


def _as_dict(estimate: Estimate) -> EstimateDict:
    return EstimateDict(mean=estimate.mean, low=estimate.low, high=estimate.high, n=estimate.n)


def _columns(values: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in values], [b for _, b in values]


def _compare(values: Sequence[tuple[float, float]]) -> Comparison:
    start, end = _columns(values)
    return Comparison(
        start=_as_dict(mean_ci(start)),
        end=_as_dict(mean_ci(end)),
        difference=_as_dict(paired_bootstrap(start, end)),
    )


def _compare_shares(values: Sequence[tuple[bool, bool]]) -> Comparison:
    start, end = _columns(values)
    return Comparison(
        start=_as_dict(wilson(sum(start), len(start))),
        end=_as_dict(wilson(sum(end), len(end))),
        difference=_as_dict(paired_bootstrap(start, end)),
    )


def _compare_reward(pairs: Sequence[Pair], source: str, trained: bool) -> RewardComparison:
    values = known_rewards(pairs, source)
    wins = sum(1.0 if b > a else 0.5 if b == a else 0.0 for a, b in values)
    return RewardComparison(**_compare(values), trained=trained, win_rate=_as_dict(wilson(wins, len(values))))


def _length_correlation(pairs: Sequence[Pair], source: str) -> float:
    known = [
        (b.rewards[source], b.length) for _, b in pairs if math.isfinite(b.rewards.get(source, math.nan))
    ]
    return correlation(*_columns(known))


def _distinct_2(pairs: Sequence[Pair]) -> dict[str, float]:
    """Distinct-n falls with the amount of text: both answers are cut to the shorter one's number of words."""
    words = [(a.response.lower().split(), b.response.lower().split()) for a, b in pairs]
    cut = [(a[: len(b)], b[: len(a)]) for a, b in words]
    return {"start": distinct_n([a for a, _ in cut], 2), "end": distinct_n([b for _, b in cut], 2)}


def with_interval(estimate: EstimateDict, sign: str = "") -> str:
    """`0.21 [0.15, 0.28]`, to two significant digits of the interval."""
    mean, low, high = estimate["mean"], estimate["low"], estimate["high"]
    decimals = _decimals((high - low) / 2)
    return (
        f"{mean:{sign}.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"
        if estimate["n"] > 1
        else compact(mean, sign)
    )


def with_margin(estimate: EstimateDict) -> str:
    """`0.41 ±0.02`: half the interval, to two significant digits."""
    mean, margin = estimate["mean"], (estimate["high"] - estimate["low"]) / 2
    decimals = _decimals(margin)
    return f"{mean:.{decimals}f} ±{margin:.{decimals}f}" if estimate["n"] > 1 else compact(mean)


def _decimals(margin: float) -> int:
    return min(4, max(0, 1 - math.floor(math.log10(margin)))) if margin > 0 else 2


def _gold_warnings(summary: Summary) -> list[str]:
    """What is trained on went up; what is watched did not follow."""
    rewards = summary["rewards"].items()
    risen = [
        (name, found["difference"])
        for name, found in rewards
        if found["trained"] and found["difference"]["low"] > 0
    ]
    warnings = []
    for name, found in rewards:
        change = found["difference"]
        # NaN bounds (a single prompt) say nothing: neither comparison holds.
        if found["trained"] or not change["low"] <= 0:
            continue
        verb = "fell" if change["high"] < 0 else "did not rise measurably"
        warnings += [
            f"{proxy}, which is trained on, rose by {with_interval(rise)}, "
            f"but {name} {verb}: {with_interval(change, '+')}"
            for proxy, rise in risen
        ]
    return warnings


def _length_warnings(summary: Summary) -> list[str]:
    """A trained reward that goes with length, while length goes the way that pays."""
    lengths = summary["length"]
    grown = lengths["difference"]["mean"]
    return [
        f"{name} goes with length: correlation {r:+.2f} over {found['end']['n']} answers, whose mean length "
        f"went from {lengths['start']['mean']:.0f} to {lengths['end']['mean']:.0f} tokens"
        for name, found in summary["rewards"].items()
        if found["trained"]
        and found["end"]["n"] >= MIN_FOR_CORRELATION
        and abs(r := summary["length_correlation"][name]) >= CORRELATION_LIMIT
        and r * grown > 0
    ]


def _drift_warnings(summary: Summary, kl_limit: float) -> list[str]:
    warnings = []
    kl, diversity = summary["kl"]["end"]["mean"], summary["distinct_2"]
    if kl > kl_limit:
        warnings.append(
            f"far from the reference: KL {compact(kl)} nats a sequence, more than {compact(kl_limit)}; "
            "a higher kl_coef, or a kl_target, holds it"
        )
    if diversity["end"] < DIVERSITY_LIMIT * diversity["start"]:
        warnings.append(
            f"the answers have become alike: distinct-2 went from {compact(diversity['start'])} to "
            f"{compact(diversity['end'])} on equal amounts of text"
        )
    return warnings


def order_by_improvement(pairs: Sequence[Pair], source: str) -> list[Pair]:
    """Pairs from the worst change of the source's reward to the best; those without one are left out."""
    known = [pair for pair in pairs if known_rewards([pair], source)]
    changes = [b.rewards[source] - a.rewards[source] for a, b in known]
    return [known[int(position)] for position in np.argsort(changes, kind="stable")]
