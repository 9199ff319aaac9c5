"""The peers of `end-to-end` on a tiny model: each does the work that it is given."""

from __future__ import annotations

import importlib.util
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.end_to_end import CONFIG
from benchmarks.peers import plain_grpo
from benchmarks.peers.arms import PEERS, work_of
from benchmarks.peers.work import Work, digest, read_steps
from rlhf_ray.config.checks import load_checked
from tests.tiny import tiny_model_folder

SMALL = (
    "online.num_steps=3",
    "online.prompts_per_step=3",
    "online.num_generations=4",
    "online.max_completion_length=5",
    "online.max_prompt_length=480",
    "training.tokens_per_micro_batch=1024",
)


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_does_the_work(peer: str, tmp_path: Path) -> None:
    if peer == "TRL" and importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    model = tiny_model_folder(tmp_path / "model")
    work = work_of(load_checked(CONFIG, [f"model.path={model}", *SMALL]))
    work.write(tmp_path / "work.json")
    command = [sys.executable, "-m", PEERS[peer], str(tmp_path / "work.json"), str(tmp_path / "steps.json")]
    subprocess.run(command, check=True, timeout=240)
    steps = read_steps(tmp_path / "steps.json")
    assert [step.prompts for step in steps] == [digest([q.token_ids for q in qs]) for qs in work.steps]
    for step, questions in zip(steps, work.steps, strict=True):
        assert step.prompt_tokens == 4 * sum(len(question.token_ids) for question in questions)
        assert 12 <= step.answer_tokens == step.trained_tokens <= 60
        assert min(step.generate, step.train, step.rest) > 0


@pytest.mark.slow
def test_the_plain_engine_serves_the_weights_that_it_is_given(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "model")
    work = work_of(load_checked(CONFIG, [f"model.path={model}", *SMALL]))
    # A process of its own, as always for vLLM.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        before, stale, after = executor.submit(gaps_of_plain_engine, work).result(timeout=240)
    assert max(before, after) < 0.02 and stale > 0.3


def gaps_of_plain_engine(work: Work) -> list[float]:
    """Mean |engine's - model's| log-prob: as loaded, of a changed model, and once that is put in."""
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    engine = plain_grpo.Engine(work)

    def gap() -> float:
        answers = engine.generate([question.token_ids for question in work.steps[0]])
        sampled = torch.cat([answer.sampler_logprobs for answer in answers])
        with torch.no_grad():
            return float((plain_grpo.logprobs_of(model, answers, work.temperature) - sampled).abs().mean())

    found = [gap()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    found.append(gap())
    engine.load(model)
    return [*found, gap()]
