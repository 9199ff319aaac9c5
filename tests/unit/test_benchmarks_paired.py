"""Comparing two arms: the order of the runs, the ratio, its interval, and when the result is void."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.paired import Goal, Options, Result, compare, run_claim, single

QUICK_PAIRS = 2


def test_arms_alternate_in_blocks_after_the_warm_ups() -> None:
    runs: list[str] = []

    def arm(name: str) -> float:
        runs.append(name)
        return 1.0

    compare("x", lambda: arm("B"), lambda: arm("A"), unit="s", pairs=3, warmups=1)
    assert "".join(runs) == "BA" + "ABBA" * 2  # three pairs are rounded up to two blocks


def test_a_drift_of_the_machine_cancels_in_the_ratio_and_shows_in_the_control() -> None:
    clock = [0.0]

    def arm(cost: float) -> float:
        clock[0] += 1
        return cost * 1.1 ** clock[0]  # every run a tenth slower than the one before

    result = compare("x", lambda: arm(2.0), lambda: arm(1.0), unit="s", pairs=20, warmups=0)
    assert result.figure == pytest.approx(2.0, rel=0.02)
    assert result.control == pytest.approx(1.1**-3)
    assert result.verdict == "void"


@pytest.mark.parametrize(
    ("goal", "verdict"), [(Goal(">=", 0.97), "missed"), (Goal("<=", 0.97), "met"), (None, "")]
)
def test_the_verdict_says_whether_the_median_meets_the_goal(goal: Goal | None, verdict: str) -> None:
    assert Result("x", "", "s", [9.0], [10.0], [0.9], goal, [1.0]).verdict == verdict


def test_the_interval_holds_the_median_and_narrows_with_agreement() -> None:
    wide = single("x", [1.0, 2.0, 3.0, 4.0, 5.0], unit="s")
    low, high = wide.interval
    assert low < wide.figure == 3.0 < high
    assert single("x", [3.0] * 5, unit="s").interval == (3.0, 3.0)


def test_a_claim_prints_keeps_every_sample_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(options: Options) -> list[Result]:
        assert options.quick and options.pairs == QUICK_PAIRS and options.folder.is_dir()
        compared = compare("x", lambda: 3.0, lambda: 4.0, unit="s", goal=Goal("<=", 1.5), pairs=options.pairs)
        return [compared, single("x", [7.0], unit="MB", case="memory")]

    json_path, plot_path = tmp_path / "new" / "x.json", tmp_path / "x.png"
    words = ["--quick", "--json", str(json_path), "--plot", str(plot_path)]
    assert run_claim("x", "About.", measure, words) == 0
    printed = capsys.readouterr().out
    assert "0.750" in printed and "<= 1.5" in printed and "met" in printed
    first, second = json.loads(json_path.read_text())["results"]
    assert first["ours"] == [3.0] * QUICK_PAIRS and first["figure"] == 0.75 and first["verdict"] == "met"
    assert second["baseline"] == [] and second["figure"] == 7.0
    assert plot_path.stat().st_size > 0
