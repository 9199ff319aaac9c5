"""Adapters in every trained model, from demonstrations to PPO, with real actors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from launch.cli import main
from rlhf_ray.reporting.metrics_log import read_metrics
from rlhf_ray.reporting.run_folder import RunFolder
from tests.command_line import ROOT
from tests.e2e.runs import EXACT, PIPELINE, Tree, weights, write_config

pytestmark = [
    pytest.mark.actors,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(300),  # the first test waits for the whole run
]

STAGES = ("sft", "reward", "online")


def section(name: str, **entries: object) -> Tree:
    found = PIPELINE[name]
    assert isinstance(found, dict)
    return {**found, **entries}


@pytest.fixture(scope="module")
def run(workplace: Path, ray_cluster: None) -> Path:
    pairs = [
        {
            "prompt": f"How do I boil {number} eggs?",
            "chosen": f"In water, {number} minutes.",
            "rejected": "Ask.",
        }
        for number in range(12)
    ]
    (workplace / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    rate = {"learning_rate": 1e-2}
    config = write_config(
        workplace / "lora.yaml",
        {
            **EXACT,
            "output_dir": "runs/lora",
            "pipeline": list(STAGES),
            "sft": section("sft", optimizer=rate),
            "reward": section("reward", dataset={"path": "pairs.jsonl"}, optimizer=rate),
            "online": section("online", num_steps=3, optimizer=rate, critic_optimizer=rate),
            "sync": {"verify_first": 3},
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        patch.setenv("PYTHONPATH", str(ROOT))
        # The section is null by default; a key of it creates it.
        code = main(["train", config.name, "training.lora.rank=4", "engine.backend=transformers"])
    assert code == 0
    return workplace / "runs" / "lora"


def test_the_reference_is_the_policy_without_its_adapters(run: Path) -> None:
    assert not (run / "online" / "logs" / "reference.log").exists()
    assert (run / "online" / "logs" / "reward.log").exists()
    first, *later = read_metrics(run / "online" / "metrics.jsonl")
    assert first["kl/per_token"] == 0.0
    assert float(first["time/reference"]) > 0
    assert all(abs(float(row["kl/per_sequence"])) > 0.01 for row in later)


def test_the_engine_gets_the_merged_weights(run: Path) -> None:
    for row in read_metrics(run / "online" / "metrics.jsonl"):
        assert float(row["sync/probe_mean"]) < 1e-4
        assert float(row["sync/probe_moved"]) > 1e-3
        assert row["sync/probe_followed"] == pytest.approx(1.0, abs=1e-2)
        assert float(row["mismatch/logprob_diff_max"]) < 1e-4


def test_only_adapted_layers_and_heads_move(run: Path, workplace: Path) -> None:
    start = weights(workplace / "tiny")
    for stage in STAGES:
        ended = weights(run / stage / "model")
        assert ended.keys() - start.keys() == ({"score.weight"} if stage == "reward" else set())
        for name in start.keys() & ended.keys():
            is_adapted = ".self_attn." in name or ".mlp." in name
            assert torch.equal(start[name], ended[name]) is not is_adapted, (stage, name)


@pytest.mark.parametrize(("stage", "base"), [("sft", "tiny"), ("reward", "sft"), ("online", "sft")])
def test_the_adapter_on_its_base_is_the_saved_model(
    run: Path, workplace: Path, stage: str, base: str
) -> None:
    auto, options = AutoModelForCausalLM, {}
    if stage == "reward":
        auto, options = AutoModelForSequenceClassification, {"num_labels": 1}
    start = workplace / base if base == "tiny" else run / base / "model"
    adapter = run / stage / "model" / "adapter"
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named).samefile(start)
    adapted = PeftModel.from_pretrained(
        auto.from_pretrained(start, dtype=torch.float32, **options), adapter
    ).merge_and_unload()
    saved = auto.from_pretrained(run / stage / "model", dtype=torch.float32).state_dict()
    for name, tensor in adapted.state_dict().items():
        assert torch.allclose(tensor, saved[name], atol=1e-6), name


def test_the_record_names_the_adapters(run: Path) -> None:
    training = RunFolder(run / "online").read().config["training"]
    assert isinstance(training, dict)
    assert training["lora"] == {"rank": 4, "alpha": 32, "target_modules": "all-linear"}
