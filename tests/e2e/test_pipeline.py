"""All four stages by the command line, and what a person finds afterwards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_ray.reporting.files import read_lines
from rlhf_ray.reporting.metrics_log import read_metrics
from rlhf_ray.reporting.run_folder import RunFolder
from tests.command_line import CommandLine, Finished
from tests.e2e.runs import rollouts, weights

pytestmark = [
    pytest.mark.actors,
    pytest.mark.timeout(900),  # the first test waits for whole runs
]

STAGES = ("sft", "preferences", "reward", "online")
QUESTION = [{"role": "user", "content": "How do I boil an egg?"}]

PLAIN_VLLM = """
import sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", max_model_len=128, enforce_eager=True, kv_cache_memory_bytes=1 << 26)
prompt = {"prompt_token_ids": [int(token) for token in sys.argv[2].split(",")]}
(output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=12))
print("TOKENS", *output.outputs[0].token_ids)
"""


@pytest.fixture(scope="module")
def finished(rlhf_ray: CommandLine) -> Finished:
    return rlhf_ray.run("train", "pipeline.yaml", timeout=280)


@pytest.fixture(scope="module")
def run(rlhf_ray: CommandLine, finished: Finished) -> Path:
    assert finished.code == 0, finished.err
    return rlhf_ray.folder / "runs" / "pipeline"


@pytest.fixture(scope="module")
def tokenizer(run: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(run / "online" / "model")


@pytest.fixture(scope="module")
def policy(run: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(run / "online" / "model", dtype=torch.float32).eval()


def test_it_says_what_it_does_and_nothing_else(finished: Finished, run: Path) -> None:
    for stage, steps in zip(STAGES, (2, 2, 2, 2), strict=True):
        assert f"{stage}: {steps} steps\n" in finished.out
        assert re.search(rf"^{stage} 2/2 \| ", finished.out, re.MULTILINE)
    assert finished.err == ""


def test_every_stage_leaves_its_files(run: Path) -> None:
    assert RunFolder(run).read().stages == STAGES
    for stage in STAGES:
        assert RunFolder(run / stage).read().status == "done"
        assert (run / stage / "metrics.jsonl").is_file()
    for stage in ("sft", "reward", "online"):
        present = {path.name for path in (run / stage / "model").iterdir()}
        assert present >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert sorted(path.name for path in (run / "online" / "rollouts").iterdir()) == [
        "step-000000.parquet",
        "step-000001.parquet",
    ]


def test_metrics_are_one_object_a_step(run: Path) -> None:
    for stage in STAGES:
        rows = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1]
        assert {row["stage"] for row in rows} == {stage}
        times = [row["time"] for row in rows]
        assert times == sorted(times) and times[0] > 1.7e9, "seconds since 1970"


def test_the_record_tells_where_everything_came_from(run: Path) -> None:
    sft, preferences, reward, online = (RunFolder(run / stage).read() for stage in STAGES)
    assert sft.parents == {"model": "tiny"}
    assert preferences.parents == {"model": "runs/pipeline/sft/model"}
    assert reward.parents == {"model": "runs/pipeline/sft/model"}
    assert online.parents == {
        "model": "runs/pipeline/sft/model",
        "reference": "runs/pipeline/sft/model",
        "reward:proxy": "runs/pipeline/reward/model",
    }
    assert len(reward.data) == 1 and "preferences.jsonl" in next(iter(reward.data))
    for record in (sft, preferences, reward, online):
        assert record.config["engine"]["dtype"] == "float32"  # type: ignore[index]
        assert record.versions["ray"] and record.versions["torch"]
        last = read_metrics(run / record.name / "metrics.jsonl")[-1]
        assert record.metrics, record.name
        assert record.metrics.items() <= last.items() or record.name == "preferences"


def test_both_annotators_voted_on_pairs_with_a_winner(run: Path) -> None:
    rows = list(read_lines(run / "preferences" / "preferences.jsonl"))
    assert 1 <= len(rows) <= 12
    for row in rows:
        assert set(row["votes"]) == {"careful", "hasty"}  # type: ignore[arg-type]
        # Two votes; a draw has no winner. So both chose it, and it is the better one: one of them never errs.
        assert row["margin"] == 1.0 and row["votes"] == {"careful": 1, "hasty": 1}
        assert row["gold_chosen"] > row["gold_rejected"]  # type: ignore[operator]
    metrics = read_metrics(run / "preferences" / "metrics.jsonl")
    assert all(0 <= float(row["preferences/agreement"]) <= 1 for row in metrics)


def test_the_first_step_starts_at_the_reference(run: Path) -> None:
    first = read_metrics(run / "online" / "metrics.jsonl")[0]
    assert abs(float(first["kl/per_token"])) < 1e-6
    assert abs(float(first["kl/per_sequence"])) < 1e-6
    # One update a step: the first and only look at the batch is by the policy that wrote it.
    assert first["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert first["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert first["policy/clip_ratio/low"] == first["policy/clip_ratio/high"] == 0.0
    assert float(first["mismatch/logprob_diff_max"]) < 1e-4


def test_every_verified_sync_agrees(run: Path) -> None:
    for row in read_metrics(run / "online" / "metrics.jsonl"):
        assert float(row["sync/probe_mean"]) < 1e-4
        assert float(row["sync/probe_moved"]) > 0.01, "a learning rate of 1e-3 moves the policy"
        assert row["sync/probe_followed"] == pytest.approx(1.0, abs=1e-2)


def test_each_stage_trained_on_what_came_before(run: Path) -> None:
    folders = (run.parents[1] / "tiny", run / "sft" / "model", run / "online" / "model")
    start, sft, online = (weights(folder)["model.layers.0.self_attn.q_proj.weight"] for folder in folders)
    # AdamW moves a weight by about its learning rate in a step: two steps each.
    assert 1e-5 < (start - sft).abs().max() < 1e-4
    assert 1e-3 < (sft - online).abs().max() < 1e-2


def test_the_lineage_is_what_the_reward_function_saw(run: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = rollouts(run / "online", 0)
    assert len(rows) == 8
    for row in rows:
        text = tokenizer.decode(row["response_ids"], skip_special_tokens=True)
        assert row["response"] == text
        expected = sum(letter in "aeiou" for letter in text) / max(1, len(text))
        assert row["reward/gold"] == pytest.approx(expected, abs=1e-6)
        assert row["reward"] == row["reward/proxy"], "the gold score has weight 0"
        assert (row["version_min"], row["version_max"]) == (0, 0)
    assert {row["version_min"] for row in rollouts(run / "online", 1)} == {1}


def test_the_reward_model_scores_alike_in_plain_transformers(
    run: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(run / "reward" / "model", dtype=torch.float32)
    assert model.config.num_labels == 1
    for row in rollouts(run / "online", 0):
        question = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        ended = [] if row["finish_reason"] == "stop" else [tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *row["response_ids"], *ended]])
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state[0, -1]
            score = float(model.score(hidden))
        assert score == pytest.approx(row["reward/proxy"], abs=1e-4)


def test_the_policy_answers_in_plain_transformers(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        logits = policy(torch.tensor([ids])).logits
    assert torch.isfinite(logits).all()


def test_the_policy_answers_alike_in_plain_vllm(
    run: Path, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    pytest.importorskip("vllm")
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    command = [sys.executable, "-c", PLAIN_VLLM, str(run / "online" / "model"), ",".join(map(str, ids))]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-2000:]
    said = next(line for line in ended.stdout.splitlines() if line.startswith("TOKENS")).split()[1:]
    tokens = list(ids)
    for _ in range(12):
        with torch.no_grad():
            tokens.append(int(policy(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    assert [int(token) for token in said] == tokens[len(ids) :]


def test_report_shows_the_run_again(rlhf_ray: CommandLine, run: Path) -> None:
    report = rlhf_ray.run("report", "runs/pipeline")
    assert report.code == 0 and report.err == ""
    for stage in STAGES:
        assert re.search(rf"^{stage} +done ", report.out, re.MULTILINE)
    assert "gold" in report.out


def test_check_counts_before_anything_starts(rlhf_ray: CommandLine) -> None:
    checked = rlhf_ray.run("check", "pipeline.yaml", "output_dir=elsewhere", "online.num_steps=7")
    assert checked.code == 0, checked.err
    assert checked.out.startswith("OK: 4 stages: sft, preferences, reward, online\n")
    assert "7 steps of 8 samples" in checked.out
    assert not (rlhf_ray.folder / "elsewhere").exists()


def test_generate_asks_the_model(rlhf_ray: CommandLine, run: Path) -> None:
    words = (
        "generate",
        run / "online" / "model",
        "--prompt",
        "How do I boil an egg?",
        "--max-completion-length",
        "8",
    )
    first, second = rlhf_ray.run(*words), rlhf_ray.run(*words)
    assert first.code == 0 and first.out.strip(), first.err
    assert first.out == second.out, "equal seeds give equal answers"
