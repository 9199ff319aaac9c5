"""PPO on several sources at once, with real actors: a server, a judge, a verifier in its own process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from aiohttp import web
from transformers import AutoModelForCausalLM

from rlhf_ray.reporting.metrics_log import read_metrics
from tests.command_line import CommandLine
from tests.e2e.runs import EXACT, Tree, rollouts, write_config
from tests.reward_servers import TOKEN, answering, running
from tests.tiny import tiny_tokenizer

pytestmark = [pytest.mark.actors, pytest.mark.slow, pytest.mark.timeout(300)]

TEMPLATE = "{completion} Good?"
WEIGHTS = {"server": 1.0, "judge": 2.0, "reasoning_gym": 1.0, "length": 0.5, "vowels": 0.0}
NUM_STEPS = 2


class FlakyServer:
    """Says how long an answer is; every third request fails."""

    def __init__(self) -> None:
        self.tokens: set[str | None] = set()
        self.num_requests = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.tokens.add(request.headers.get("Authorization"))
        self.num_requests += 1
        if self.num_requests % 3 == 1:
            return web.Response(status=503)
        completions = (await request.json())["completions"]
        return web.json_response({"rewards": [len(text) / 10 for text in completions]})


def config(url: str, backend: str) -> Tree:
    return {
        **EXACT,
        "engine": {"backend": backend, "dtype": "float32", "cpu_kv_cache_gib": 0.05},
        "output_dir": f"runs/rewards-{backend}",
        "online": {
            "dataset": {"path": "reasoning_gym:chain_sum", "limit": 12, "options": {"max_terms": 2}},
            "eval_dataset": {"path": "reasoning_gym:chain_sum", "split": "test", "limit": 2},
            "rewards": [
                {"type": "http", "name": "server", "url": url, "token_env": "MY_TOKEN", "batch_size": 3},
                {"type": "judge", "name": "judge", "template": "judge.txt", "weight": 2.0, "max_length": 256},
                {"type": "reasoning_gym"},
                {"type": "length", "target": 6, "weight": 0.5},
                {"type": "function", "name": "vowels", "function": "my_rewards:vowels", "weight": 0},
            ],
            "num_steps": NUM_STEPS,
            "prompts_per_step": 3,
            "num_generations": 2,
            "max_prompt_length": 300,
            "max_completion_length": 12,
            "critic_init": "policy",
        },
        "checkpoint": {"every": None},
    }


@torch.no_grad()
def probability_of_yes(folder: Path, text: str) -> float:
    tokenizer, model = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(folder).eval()
    question = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    start = len(tokenizer(question)["input_ids"])
    logprobs = []
    for reply in ("Yes", "No"):
        ids = torch.tensor([tokenizer(question)["input_ids"] + tokenizer(reply)["input_ids"]])
        following = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        logprobs.append(float(following.gather(-1, ids[0, start:, None]).sum()))
    return float(1 / (1 + np.exp(logprobs[1] - logprobs[0])))


@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_all_sources_of_a_step_are_merged(rlhf_ray: CommandLine, backend: str) -> None:
    here, server = rlhf_ray.folder, FlakyServer()
    (here / "judge.txt").write_text(TEMPLATE)
    with running(answering(server.answer)) as url:
        write_config(here / "rewards.yaml", config(url, backend))
        finished = rlhf_ray.run("train", "rewards.yaml", MY_TOKEN=TOKEN)
    assert finished.code == 0, finished.err
    run = here / "runs" / f"rewards-{backend}"
    assert server.tokens == {f"Bearer {TOKEN}"}
    for step in range(NUM_STEPS):
        rows = rollouts(run, step)
        assert len(rows) == 6
        for row in rows:
            parts = {name: float(row[f"reward/{name}"]) for name in WEIGHTS}  # type: ignore[arg-type]
            text = str(row["response"])
            assert parts["server"] == pytest.approx(len(text) / 10)
            assert parts["judge"] == pytest.approx(
                probability_of_yes(here / "tiny", TEMPLATE.replace("{completion}", text)), rel=1e-3
            )
            assert parts["reasoning_gym"] in (0.0, 1.0)
            count = len(row["response_ids"])  # type: ignore[arg-type]
            assert parts["length"] == pytest.approx(max(-1.0, -abs(count - 6) / 6))
            total = sum(weight * parts[name] for name, weight in WEIGHTS.items())
            assert row["reward"] == pytest.approx(total, rel=1e-5)
    steps = read_metrics(run / "metrics.jsonl")
    assert sum(float(row["reward/server/retries"]) for row in steps) >= 2
    assert {row["reward/server/failures"] for row in steps} == {0.0}
    assert all(row["time/judge"] > 0 for row in steps)  # type: ignore[operator]
    written = json.loads((run / "run.json").read_text())
    assert "MY_TOKEN" in json.dumps(written)
    assert not [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in finished.out + finished.err
