"""The same work by TRL's GRPOTrainer, as it is, on a CPU.

python -m benchmarks.peers.trl_grpo WORK OUT

Its fastest settings that leave the work the same, by its source and by trial:

- float32 weights under bfloat16 autocast where the others train so; generation runs under autocast too.
- no gradient checkpointing (its default is on), fused AdamW, as many rows a pass as the others' budget of
  tokens holds; no logging, no saving.
- transformers' generate with its KV cache, all answers of a step in one batch. Continuous batching would
  change the work: with bf16 the trainer then casts the weights that it trains to bfloat16, for good, and
  updates of 1e-5 are rounded away. Its two ways to vLLM need a GPU: a server receives weights over NCCL, and
  an engine in the process by `load_weights`, into weights that vLLM keeps in another form on a CPU.
- vLLM is hidden from it, so that an import which it does not use costs it no memory.

Two optimizer steps a batch make it compute the log-probs of the old policy, as the others do. Its loss `dapo`
is the mean over tokens; where lengths differ, the two halves of a batch share one denominator.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

from benchmarks.peers.work import Step, Stopwatch, Work, digest, write_steps

sys.modules["vllm"] = None  # type: ignore[assignment]  # before TRL looks for it

from trl import GRPOConfig, GRPOTrainer  # noqa: E402


class TimedTrainer(GRPOTrainer):
    """TRL's trainer with a stopwatch around its parts; nothing else is changed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.preparing, self.parts = Stopwatch(), Stopwatch()
        self.prompts: list[list[int]] = []
        self.trained = 0

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        with self.preparing("prepare"):
            return super()._prepare_inputs(generation_batch)

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        self.prompts = [list(ids) for ids in prompt_ids]
        with self.parts("generate"):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():  # a part of the update, which is what remains of the step
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with self.parts("old_logprobs"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self.trained += int(inputs["completion_mask"].sum())
        return super()._compute_loss(model, inputs)


class Recorder(TrainerCallback):
    """Ends a step of the work after every `num_mini_batches` optimizer steps."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.steps: list[Step] = []
        self.rewards: list[float] = []
        self.answer_tokens = 0
        self.trainer: TimedTrainer | None = None
        self.began = 0.0

    def reward(
        self, prompts: Any, completions: Any, completion_ids: Any, place: Any, **_: Any
    ) -> list[float]:
        step, size = len(self.steps), len(self.work.steps[0])
        questions = [self.work.steps[step][int(index) - step * size] for index in place]
        self.rewards = self.work.score(questions, [completion[0]["content"] for completion in completions])
        self.answer_tokens = sum(map(len, completion_ids))
        return self.rewards

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.work.num_mini_batches:
            return
        assert self.trainer is not None
        seconds = time.perf_counter() - self.began
        preparing, parts = self.trainer.preparing.take()["prepare"], self.trainer.parts.take()
        prompts = self.trainer.prompts
        self.steps.append(
            Step(
                seconds=seconds,
                generate=parts["generate"],
                train=seconds - preparing + parts["old_logprobs"],
                reward=sum(self.rewards) / len(self.rewards),
                prompts=digest(prompts[:: self.work.num_generations]),
                answers=len(prompts),
                prompt_tokens=sum(map(len, prompts)),
                answer_tokens=self.answer_tokens,
                trained_tokens=self.trainer.trained,
            )
        )
        self.trainer.trained = 0
        print(self.steps[-1], flush=True)
        self.began = time.perf_counter()


def settings(work: Work, folder: str) -> GRPOConfig:
    rows = work.rows_per_pass
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=work.uses_bfloat16,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        max_steps=len(work.steps) * work.num_mini_batches,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=work.rows_per_update // rows,
        generation_batch_size=work.samples_per_step,
        num_generations=work.num_generations,
        max_completion_length=work.max_completion_length,
        temperature=work.temperature,
        shuffle_dataset=False,
        seed=work.seed,
        loss_type="dapo",
        epsilon=work.cliprange,
        beta=0.0,
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=work.max_grad_norm,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def main(work: Work, out: Path) -> None:
    torch.set_num_threads(work.threads)
    tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
    tokenizer.chat_template = work.template
    questions = [question for step in work.steps for question in step]
    rows = [{"prompt": question.messages, "place": place} for place, question in enumerate(questions)]
    recorder = Recorder(work)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(
            model=work.model,
            reward_funcs=recorder.reward,
            args=settings(work, folder),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[recorder],
        )
        recorder.trainer = trainer
        assert trainer.model is not None
        weights = next(trainer.model.parameters())
        assert weights.dtype == torch.float32 and torch.get_num_threads() == work.threads
        trainer.train()
    write_steps(out, recorder.steps)


if __name__ == "__main__":
    main(Work.read(Path(sys.argv[1])), Path(sys.argv[2]))
