"""Episodes of several turns through the real engine and all actors."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cli import main
from rlhf_ray.reporting.metrics_log import read_metrics
from tests.command_line import ROOT
from tests.e2e.runs import rollouts

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_cluster")]

ENVIRONMENT = '''\
"""A person's own environment, beside the configuration."""

from rlhf_ray.environments import StepResult


class Eggs:
    def __init__(self, word):
        self.word = word

    def reset(self, messages, columns, seed):
        self.eggs = columns["eggs"]

    def step(self, answer):
        if self.eggs == 3:
            raise ValueError("three eggs are too many")
        self.eggs += 1
        return StepResult(f"{self.word} {self.eggs}", reward=len(answer.text) / 10, done=self.eggs % 4 == 0)
'''


def test_episodes_from_beginning_to_end(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (workplace / "egg_environment.py").write_text(ENVIRONMENT)
    environment = "{class_path: 'egg_environment:Eggs', options: {word: cook}, max_turns: 3}"
    code = main(
        [
            "train",
            "online.yaml",
            "output_dir=runs/episodes",
            f"online.environment={environment}",
            "online.environment.max_episode_length=120",
            "online.algorithm=grpo",
            "online.critic_init=reward",
            "online.num_steps=2",
            "online.kl_target=null",
        ]
    )
    assert code == 0
    run = workplace / "runs" / "episodes"
    rows = read_metrics(run / "metrics.jsonl")
    assert abs(float(rows[0]["kl/per_token"])) < 1e-6
    assert rows[0]["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert float(rows[1]["kl/per_sequence"]) > 0.001
    for step, row in enumerate(rows):
        # Engine and trainer see the same tokens, turn for turn, or their log-probs would differ.
        assert float(row["mismatch/logprob_diff_max"]) < 1e-4
        samples = rollouts(run, step)
        failed = [s for s in samples if s["failure"] is not None]
        assert row["environment/failed_fraction"] == pytest.approx(len(failed) / len(samples))
        assert {str(s["failure"]) for s in failed} <= {"step: raised ValueError: three eggs are too many"}
        for sample in samples:
            said = [line for line in str(sample["response"]).splitlines() if line.startswith("> cook")]
            assert (sample["version_min"], sample["version_max"]) == (step, step)
            assert all(sample["is_sampled"]) == (not said)  # type: ignore[call-overload]
            assert sample["reward"] == pytest.approx(
                sample["reward/environment"] + sample["reward/vowels"], abs=1e-5
            )
    assert max(float(row["environment/turns"]) for row in rows) > 1
    assert (run / "model" / "model.safetensors").is_file()
