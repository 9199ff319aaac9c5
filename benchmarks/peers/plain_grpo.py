"""GRPO in one process without Ray, DeepSpeed or actors: a vLLM engine, a torch model, and a loop.

python -m benchmarks.peers.plain_grpo WORK OUT

What a good engineer would write in a day for one machine: answers to one prompt share its prefix in the
engine; rows of similar length share a pass within a budget of tokens, without attention masks; the head is
applied where answers are, and to nothing else; float32 weights, under bfloat16 autocast where that is fast,
fused AdamW; new weights go into the engine in place, without a copy over any wire. It measures nothing that
training does not need: no entropy, no lineage, no verification of the engine's weights but one assertion.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.peers.work import Question, Step, Stopwatch, Work, digest, write_steps

STALE = 0.25
"""Mean difference of log-probs, in nats a token, at which the engine has other weights than the trainer."""


@dataclass
class Answer:
    """One sampled answer and what becomes of it. All tensors are [T], a value a token."""

    prompt: list[int]
    tokens: list[int]
    sampler_logprobs: Tensor
    old_logprobs: Tensor
    advantage: float = 0.0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.tokens)


class Engine:
    """vLLM in this process."""

    def __init__(self, work: Work) -> None:
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
        )
        from vllm import LLM, SamplingParams

        self.llm = LLM(
            work.model,
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype="bfloat16" if work.uses_bfloat16 else "float32",
            max_model_len=work.max_prompt_length + work.max_completion_length,
            max_num_seqs=work.max_num_seqs,
            kv_cache_memory_bytes=int(work.kv_cache_gib * 2**30),
            max_num_batched_tokens=4096,
            enforce_eager=True,
            logprobs_mode="processed_logprobs",
            seed=work.seed,
            disable_log_stats=True,
        )
        self.sampling = SamplingParams(
            n=work.num_generations,
            temperature=work.temperature,
            max_tokens=work.max_completion_length,
            stop_token_ids=work.eos_ids,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )

    def generate(self, prompts: list[list[int]]) -> list[Answer]:
        from vllm import TokensPrompt
        from vllm.logprobs import FlatLogprobs

        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], self.sampling, use_tqdm=False
        )
        answers = []
        for prompt, output in zip(prompts, outputs, strict=True):
            for sample in output.outputs:
                logprobs = sample.logprobs
                assert isinstance(logprobs, FlatLogprobs)
                own = torch.tensor([logprobs.logprobs[start] for start in logprobs.start_indices])
                answers.append(Answer(prompt, list(sample.token_ids), own, torch.empty(0)))
        return answers

    def load(self, model: PreTrainedModel) -> None:
        """Put the trainer's weights in place; what was cached under the old ones is dropped."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        config = self.llm.llm_engine.vllm_config.model_config
        weights = ((name, weight.detach().to(config.dtype)) for name, weight in model.named_parameters())

        def put(served: nn.Module) -> None:
            # The engine's kernels keep weights in a form of their own.
            initialize_layerwise_reload(served)
            served.load_weights(weights)  # type: ignore[operator]
            finalize_layerwise_reload(served, config)
            for module in served.modules():  # a head that is tied to the embedding is not reloaded with it
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)

        self.llm.apply_model(put)
        assert self.llm.reset_prefix_cache()


def micro_batches(answers: list[Answer], token_budget: int) -> Iterator[list[Answer]]:
    """Longest first, cut where the padded rectangle would exceed the budget."""
    batch: list[Answer] = []
    for answer in sorted(answers, key=len, reverse=True):
        if batch and len(batch[0]) * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(answer)
    yield batch


def logprobs_of(
    model: PreTrainedModel, batch: list[Answer], temperature: float, uses_bfloat16: bool
) -> Tensor:
    """Of all answer tokens of the batch, row after row."""
    ids = torch.zeros((len(batch), max(map(len, batch))), dtype=torch.long)
    is_source = torch.zeros_like(ids, dtype=torch.bool)  # the position before each answer token
    for row, answer in enumerate(batch):
        ids[row, : len(answer)] = torch.tensor(answer.prompt + answer.tokens)
        is_source[row, len(answer.prompt) - 1 : len(answer) - 1] = True
    targets = torch.tensor([token for answer in batch for token in answer.tokens])
    with torch.autocast("cpu", torch.bfloat16, enabled=uses_bfloat16):
        # Right padding under a causal mask: no real token sees it.
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[is_source])
    return -F.cross_entropy(logits.float() / temperature, targets, reduction="none")


def advantages_of(rewards: list[float], group_size: int) -> list[float]:
    groups = torch.tensor(rewards).view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten().tolist()


def policy_loss(work: Work, batch: list[Answer], logprobs: Tensor) -> Tensor:
    """The clipped surrogate, summed over tokens, weighted by trainer / engine."""
    old = torch.cat([answer.old_logprobs for answer in batch])
    sampler = torch.cat([answer.sampler_logprobs for answer in batch])
    advantages = torch.cat([torch.full((len(answer.tokens),), answer.advantage) for answer in batch])
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - work.cliprange, 1 + work.cliprange)
    weights = (old - sampler).exp().clamp(max=work.importance_cap)
    return -(torch.minimum(ratio * advantages, clipped * advantages) * weights).sum()


class Trainer:
    def __init__(self, work: Work) -> None:
        self.work = work
        self.model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=work.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.generator = torch.Generator().manual_seed(work.seed)

    def _logprobs(self, batch: list[Answer]) -> Tensor:
        return logprobs_of(self.model, batch, self.work.temperature, self.work.uses_bfloat16)

    @torch.no_grad()
    def look(self, answers: list[Answer]) -> None:
        """Log-probs of the policy before it moves."""
        for batch in micro_batches(answers, self.work.tokens_per_micro_batch):
            found = self._logprobs(batch)
            for answer, own in zip(batch, found.split([len(a.tokens) for a in batch]), strict=True):
                answer.old_logprobs = own

    def update(self, answers: list[Answer]) -> int:
        """Returns: tokens that were trained on."""
        trained = 0
        order = torch.randperm(len(answers), generator=self.generator)
        for part in order.chunk(self.work.num_mini_batches):
            chosen = [answers[row] for row in part.tolist()]
            num_tokens = sum(len(answer.tokens) for answer in chosen)
            for batch in micro_batches(chosen, self.work.tokens_per_micro_batch):
                logprobs = self._logprobs(batch)
                (policy_loss(self.work, batch, logprobs) / num_tokens).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.work.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            trained += num_tokens
        return trained


def run_step(
    work: Work,
    questions: list[Question],
    engine: Engine,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
) -> Step:
    watch, began = Stopwatch(), time.perf_counter()
    prompts = [question.token_ids for question in questions]
    with watch("generate"):
        answers = engine.generate(prompts)
    texts = tokenizer.batch_decode([answer.tokens for answer in answers], skip_special_tokens=True)
    rewards = work.score([q for q in questions for _ in range(work.num_generations)], texts)
    for answer, advantage in zip(answers, advantages_of(rewards, work.num_generations), strict=True):
        answer.advantage = advantage
    with watch("train"):
        trainer.look(answers)
        trained = trainer.update(answers)
    engine.load(trainer.model)
    seconds = time.perf_counter() - began
    gaps = torch.cat([answer.old_logprobs - answer.sampler_logprobs for answer in answers])
    assert gaps.abs().mean() < STALE, f"the engine's log-probs are {gaps.abs().mean():.3f} nats off"
    return Step(
        seconds=seconds,
        generate=watch.seconds["generate"],
        train=watch.seconds["train"],
        reward=sum(rewards) / len(rewards),
        prompts=digest(prompts),
        answers=len(answers),
        prompt_tokens=sum(len(answer.prompt) for answer in answers),
        answer_tokens=sum(len(answer.tokens) for answer in answers),
        trained_tokens=trained,
    )


def main(work: Work, out: Path) -> None:
    torch.set_num_threads(work.threads)
    torch.manual_seed(work.seed)
    trainer, engine = Trainer(work), Engine(work)  # vLLM fixes the threads of the process
    assert torch.get_num_threads() == work.threads
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    steps = []
    for questions in work.steps:
        steps.append(run_step(work, questions, engine, trainer, tokenizer))
        print(steps[-1], flush=True)
    write_steps(out, steps)


if __name__ == "__main__":
    main(Work.read(Path(sys.argv[1])), Path(sys.argv[2]))
