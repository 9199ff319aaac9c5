"""All claims in one table: which run, what becomes of one that breaks off, and reading results again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import all_
from benchmarks.paired import Goal, Result, write_results
from rlhf_ray.errors import UserError

FAST = Result("sync", "135M", "s", [1.0, 1.5], [1.0, 1.0], [1.0, 1.5], Goal("<=", 1.5), [1.0])
ALONE = Result("overhead", "", "of a step", [0.01, 0.02], [], [0.01, 0.02], Goal("<=", 0.03))


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    write_results(tmp_path / "sync.json", [FAST, ALONE])
    text = (tmp_path / "sync.json").read_text()
    assert "NaN" not in text, "JSON has no such number"
    rows = json.loads(text)["results"]
    assert [Result.from_record(row) for row in rows] == [FAST, ALONE]
    assert Goal.parse(">= 0.97") == Goal(">=", 0.97)


def test_only_and_skip_choose_in_the_order_of_the_table() -> None:
    assert all_.chosen([], []) == list(all_.CLAIMS)
    assert all_.chosen(["async", "rollout"], []) == ["rollout", "async"]
    assert all_.chosen(["async", "rollout"], ["async"]) == ["rollout"]
    with pytest.raises(UserError, match=r"no claim rolout .*did you mean rollout"):
        all_.chosen([], ["rolout"])


def test_a_missing_module_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_, "benchmarks", lambda: {"overhead": None})
    all_.check_present(["overhead"])
    with pytest.raises(UserError, match=r"missing: benchmarks/train_padded\.py; .*--skip train-padded"):
        all_.check_present(["overhead", "train-padded"])


def script(folder: Path, text: str) -> list[str]:
    path = folder / "script.py"
    path.write_text(text)
    return [sys.executable, str(path)]


def test_a_claim_is_said_line_by_line_and_its_failure_kept(tmp_path: Path) -> None:
    write_results(tmp_path / "sync.json", [FAST])  # of an earlier run
    said: list[str] = []
    command = script(tmp_path, "print('block 1')\nraise SystemExit('rlhf-ray: no GPU')\n")
    outcome = all_.run_claim_alone("sync", command, tmp_path, 1.0, said.append)
    assert said == ["block 1", "rlhf-ray: no GPU"]
    assert outcome.results == [] and outcome.failure == f"rlhf-ray: no GPU (see {tmp_path / 'sync.log'})"
    assert not (tmp_path / "sync.json").exists()


def test_a_claim_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    command = script(tmp_path, "import time\nprint('block 1', flush=True)\ntime.sleep(60)\n")
    outcome = all_.run_claim_alone("sync", command, tmp_path, 2 / 60, lambda line: None)
    assert outcome.failure is not None and outcome.failure.startswith("ended after 0.0333333 minutes")


def test_the_others_run_and_the_command_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(tmp_path / "made.json", [FAST])

    def command(claim: str, args: object) -> list[str]:
        if claim == "train":
            return script(tmp_path, "raise SystemExit('broken')")
        return ["cp", str(tmp_path / "made.json"), str(tmp_path / "out" / f"{claim}.json")]

    monkeypatch.setattr(all_, "command_of", command)
    monkeypatch.setattr(all_, "check_present", lambda claims: None)
    words = ["--only", "train", "sync", "--folder", str(tmp_path / "out")]
    assert all_.main(words) == 1
    printed = capsys.readouterr()
    assert "failed" in printed.out and "sync 135M" in printed.out
    assert printed.err == f"train failed: broken (see {tmp_path / 'out' / 'train.log'})\n"
    kept = json.loads((tmp_path / "out" / "all.json").read_text())
    assert [row["claim"] for row in kept["results"]] == ["sync"] and list(kept["failures"]) == ["train"]
    assert (tmp_path / "out" / "all.png").stat().st_size > 0

    assert all_.main(["--from", str(tmp_path / "out"), "--markdown"]) == 1
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| train |  |  |  |  |  |  |  | failed |",
        "| sync 135M | 1.25 | 1 | s | 1.250 | 1-1.5 | <= 1.5 | 1.000 | met |",
    ]
    assert all_.main(["--from", str(tmp_path / "out"), "--skip", "train"]) == 0


def test_no_results_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results there"):
        all_.main(["--from", str(tmp_path)])
