"""Start against end: numbers by hand, warnings where they belong and only there, and the printed report."""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from rlhf_ray.errors import DataError
from rlhf_ray.reporting import run_folder
from rlhf_ray.reporting.evaluation import (
    EvalRecord,
    load_records,
    order_by_improvement,
    pair_records,
    save_records,
    summarise,
)
from rlhf_ray.reporting.run_folder import RunFolder, RunRecord
from rlhf_ray.reporting.summary import (
    choose_examples,
    closing_markdown,
    closing_rows,
    render_run,
    save_closing,
)

WORDS = [f"w{number}" for number in range(500)]


def record(prompt_id: int, gold: float, proxy: float = 0.0, **changes: object) -> EvalRecord:
    base = EvalRecord(
        prompt_id, f"prompt {prompt_id}", "one two", {"proxy": proxy, "gold": gold}, 0.0, 10, True
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def many(num: int, gold: float, proxy: float, seed: int, num_words: int = 12) -> list[EvalRecord]:
    """Diverse answers whose rewards vary by 0.5 around their means, and do not go with length."""
    rng = np.random.default_rng(seed)
    return [
        record(
            i,
            float(rng.normal(gold, 0.5)),
            float(rng.normal(proxy, 0.5)),
            response=" ".join(rng.choice(WORDS, num_words)),
            length=int(rng.integers(10, 30)),
        )
        for i in range(num)
    ]


def test_numbers_by_hand() -> None:
    start = [record(1, 0.0, kl=0.0), record(2, 1.0), record(3, 2.0, finished=False), record(4, 5.0)]
    end = [
        record(4, 5.0, kl=4.0, length=20),
        record(3, 1.0, kl=2.0, length=20),
        record(2, 3.0, kl=3.0, length=30),
        record(1, 1.0, kl=3.0, length=30),
    ]
    found = summarise(start, end, watched=["gold"])
    gold = found["rewards"]["gold"]
    assert (gold["start"]["mean"], gold["end"]["mean"], gold["difference"]["mean"]) == (2.0, 2.5, 0.5)
    # Ends better on prompts 1 and 2, worse on 3, equal on 4: (2 + 1/2) / 4.
    assert gold["win_rate"]["mean"] == 0.625 and gold["win_rate"]["n"] == 4
    # s = sqrt(14 / 3), t(0.975, 3) = 3.18245: 3.18245 * 2.16025 / 2 = 3.43743
    assert gold["start"]["high"] == pytest.approx(2 + 3.43743, abs=1e-4)
    assert (gold["trained"], found["rewards"]["proxy"]["trained"]) == (False, True)
    assert (found["kl"]["end"]["mean"], found["length"]["difference"]["mean"]) == (3.0, 15.0)
    assert (found["truncated"]["start"]["mean"], found["truncated"]["end"]["mean"]) == (0.25, 0.0)
    # Every answer is "one two": one different pair of four.
    assert found["distinct_2"] == {"start": 0.25, "end": 0.25}
    # gold 5, 1, 3, 1 and lengths 20, 20, 30, 30: sums of products of deviations -10, 11 and 100.
    assert found["length_correlation"]["gold"] == pytest.approx(-10 / math.sqrt(11 * 100))
    assert math.isnan(found["length_correlation"]["proxy"])
    assert (found["prompts"], found["unpaired"]) == (4, 0)


def test_prompts_of_one_end_only_and_missing_rewards_are_left_out_and_counted() -> None:
    start = [record(1, 1.0), record(2, math.nan, 3.0), record(3, 9.0)]
    end = [record(1, 2.0), record(2, 7.0, 4.0), record(5, 9.0)]
    found = summarise(start, end)
    assert (found["prompts"], found["unpaired"]) == (2, 2)
    assert found["rewards"]["gold"]["difference"]["mean"] == 1.0 and found["rewards"]["gold"]["end"]["n"] == 1
    assert found["rewards"]["proxy"]["end"] == pytest.approx(
        {"mean": 2.0, "low": -23.41, "high": 27.41, "n": 2}, abs=0.01
    )


def test_two_records_for_a_prompt_are_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="several records"):
        pair_records([record(1, 0.0), record(1, 0.0)], [record(1, 0.0)])


def test_a_healthy_run_has_no_warnings() -> None:
    assert summarise(many(64, 0, 0, 1), many(64, 1, 1, 2), watched=["gold"])["warnings"] == []
    assert summarise([record(1, 0.0)], [record(1, 1.0, 1.0)], watched=["gold"])["warnings"] == []
    assert summarise([], [], watched=["gold"])["warnings"] == []


@pytest.mark.parametrize(("end_gold", "verb"), [(-1.0, "fell"), (0.0, "did not rise measurably")])
def test_proxy_up_and_gold_not(end_gold: float, verb: str) -> None:
    found = summarise(many(64, 0, 0, 1), many(64, end_gold, 2, 2), watched=["gold"])
    (warning,) = found["warnings"]
    assert warning.startswith("proxy, which is trained on, rose by 2.0")
    assert f"but gold {verb}: " in warning
    # Without a rise of the proxy nothing is hacked.
    assert summarise(many(64, 0, 0, 1), many(64, end_gold, 0, 2), watched=["gold"])["warnings"] == []


def test_reward_that_goes_with_growing_length() -> None:
    start = many(32, 0, 0, 1)
    end = [record(i, 1.0, 0.1 * i, response=start[i].response, length=20 + i) for i in range(32)]
    (warning,) = summarise(start, end)["warnings"]
    assert warning == (
        "proxy goes with length: correlation +1.00 over 32 answers, whose mean length went from "
        f"{np.mean([found.length for found in start]):.0f} to 36 tokens"
    )
    shorter = [replace(found, length=found.length - 30) for found in end]
    assert summarise(start, shorter)["warnings"] == []  # longer is better, yet the answers became shorter
    assert summarise(start[:8], end[:8])["warnings"] == []  # too few to tell


def test_far_from_the_reference_and_alike() -> None:
    start = many(16, 0, 0, 1)
    far = [replace(found, kl=30.0) for found in start]
    assert summarise(start, far)["warnings"] == [
        "far from the reference: KL 30.0 nats a sequence, more than 20.0; "
        "a higher kl_coef, or a kl_target, holds it"
    ]
    assert summarise(start, far, kl_limit=31.0)["warnings"] == []
    alike = [replace(found, response="what a lovely question") for found in start]
    # 3 different pairs of 3 * 16; the start is cut to four words an answer: 48 pairs, all different.
    assert summarise(start, alike)["warnings"] == [
        "the answers have become alike: distinct-2 went from 1.00 to 0.062 on equal amounts of text"
    ]
    longer = [replace(found, response=f"{found.response} {found.response}") for found in start]
    assert summarise(start, longer)["warnings"] == []  # more text alone is no loss of diversity


def test_examples_are_the_median_and_the_worst() -> None:
    start = [record(i, 0.0) for i in range(7)]
    changes = [3.0, -5.0, 1.0, 2.0, math.nan, 9.0, 4.0]  # sorted: -5 1 2 3 4 9
    end = [record(i, change) for i, change in enumerate(changes)]
    summary = summarise(start, end, watched=["gold"])
    assert [pair[1].prompt_id for pair in order_by_improvement(pair_records(start, end), "gold")] == [
        1,
        2,
        3,
        0,
        6,
        5,
    ]
    assert [(e.caption, e.end.prompt_id) for e in choose_examples(summary, start, end)] == [
        ("Typical change: gold 0.00 to 2.00", 3),
        ("Typical change: gold 0.00 to 3.00", 0),
        ("Worst change: gold 0.00 to -5.00", 1),
    ]
    one = summarise(start[:1], end[:1])
    assert [e.end.prompt_id for e in choose_examples(one, start[:1], end[:1])] == [0]


def test_records_survive_the_file(tmp_path: Path) -> None:
    start = [record(1, 0.5, response='líne\n"two"\u2028'), record(2, math.nan)]
    path = tmp_path / "eval.jsonl"
    save_records(path, start)
    assert load_records(path)[1] == []
    save_records(path, start, start[:1])
    found_start, found_end = load_records(path)
    assert found_start[0] == start[0] == found_end[0]
    assert math.isnan(found_start[1].rewards["gold"]) and found_start[1].rewards["proxy"] == 0.0
    path.write_text('{"when": "later"}\n')
    with pytest.raises(DataError, match=r"eval\.jsonl:1: not an evaluation record"):
        load_records(path)


def test_closing_rows() -> None:
    start, end = [record(i, i / 10) for i in range(5)], [record(i, 1 + i / 10, kl=2.0) for i in range(5)]
    rows = {row[0]: row[1:] for row in closing_rows(summarise(start, end, watched=["gold"]))}
    # s = sqrt(0.025), t(0.975, 4) = 2.77645: half = 0.19632; 5 wins of 5: Wilson from 5 / (5 + 3.8415).
    assert rows["gold"] == ("0.20 ±0.20", "1.20 ±0.20", "+1.00 [1.00, 1.00]", "100% [57, 100]")
    assert rows["KL"] == ("0.00 ±0.00", "2.00 ±0.00", "+2.00 [2.00, 2.00]", "")
    assert rows["cut off"] == ("0%", "0%", "+0 [0, 0]", "")
    unmeasured = [record(i, 1.0, kl=math.nan) for i in range(5)]
    assert "KL" not in {row[0] for row in closing_rows(summarise(start, unmeasured, watched=["gold"]))}


def pipeline(path: Path) -> RunFolder:
    root = RunFolder(path)
    root.begin(RunRecord("pipeline", {}, ("sft", "online", "reward")), resume=False)
    for name, metrics in {
        "sft": {"sft/loss": 1.25},
        "online": {"reward/mean": 0.5, "perf/tokens_per_second": 9.0},
    }.items():
        stage = root.stage(name)
        stage.begin(RunRecord(name, {}), resume=False)
        if name == "online":
            start = many(20, 0, 0, 1)
            end = [
                replace(found, response="evil \x1b[2J [red]markup[/red] ```fence```")
                for found in many(20, -1, 2, 2)
            ]
            save_closing(stage, summarise(start, end, watched=["gold"]), start, end)
        stage.finish("done", metrics)
    root.finish("failed", error="WorkerError: no answer")
    return root


@pytest.mark.parametrize("width", [80, 120])
def test_a_run_is_printed_again_from_disk(
    tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=itertools.count(0, 61).__next__))
    root = pipeline(tmp_path / "run")
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        render_run(root.path, console)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert "WorkerError: no answer" in lines
    assert "sft     done         1:01  loss 1.25" in lines
    assert "online  done         1:01  reward 0.500" in lines
    assert "reward  not started" in lines
    assert sum(line.startswith("Warning: proxy, which is trained on, rose by") for line in lines) == 1
    gold = next(line for line in lines if line.startswith("gold "))
    assert gold.count("±") == 2 and "[" in gold and gold.endswith("]")  # one line, not wrapped
    assert "\x1b" not in capture.get() and "[red]markup[/red]" in capture.get()
    assert max(map(len, lines)) <= width
    with console.capture() as capture:
        render_run(root.stage("online").path, console)
    assert "Typical change: gold" in capture.get()


def test_the_markdown_report(tmp_path: Path) -> None:
    report = pipeline(tmp_path / "run").stage("online").report_path.read_text()
    lines = report.splitlines()
    assert lines[2:4] == ["|  | start | end | change | end wins |", "|---|---:|---:|---:|---:|"]
    assert lines[4].startswith("| proxy | ") and lines[4].count("|") == 6
    assert "**Warning:** proxy, which is trained on, rose by" in report
    # The fence is longer than the answer's own.
    position = lines.index("evil \N{REPLACEMENT CHARACTER}[2J [red]markup[/red] ```fence```")
    assert lines[position - 1 : position + 2 : 2] == ["````text", "````"]


def test_a_report_without_rewards_has_no_examples() -> None:
    start = [record(1, 0.0, rewards={})]
    summary = summarise(start, start)
    assert choose_examples(summary, start, start) == []
    assert "##" not in closing_markdown(summary, start, start)


def test_no_run_to_print(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not a run: it has no run\.json"):
        render_run(tmp_path)
