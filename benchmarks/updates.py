"""What the claims about training share: a batch of recorded lengths, our policy update on it, and the same
update as a plain DeepSpeed loop.

All arms begin with the same weights and train with a learning rate too small to move them, so that every run
does the same work: that all give the same loss is asserted at every run, and the same norm of the gradient in
float32, once before the others. In bfloat16 that norm is noise in part: over random tokens it differs by
some percent from run to run of one and the same arm, and by more between batches of other shapes.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.paired import Options
from rlhf_ray.config.schema import EMBEDDED_MODEL, ModelSection, OnlineSection, TrainingSection
from rlhf_ray.engines.deepspeed_engine import World
from rlhf_ray.engines.number_formats import multiplies_bfloat16
from rlhf_ray.models.loading import load_policy_model, materialise
from rlhf_ray.types import Ragged, RLBatch, Rollouts
from rlhf_ray.workers.model_worker import WorkerSpec
from rlhf_ray.workers.policy import PolicyWorker

LENGTHS = (
    *((18, 34), (77, 32), (20, 12), (19, 15), (111, 52), (124, 34), (13, 9), (12, 30), (94, 12), (36, 42)),
    *((15, 26), (16, 18), (146, 14), (80, 31), (118, 36), (148, 13), (18, 12), (28, 9), (128, 12), (85, 59)),
    *((92, 21), (75, 7), (113, 58), (25, 23), (160, 14), (14, 22), (20, 13), (131, 69), (17, 22), (165, 25)),
    *((62, 29), (165, 18), (32, 74), (17, 18), (14, 30), (26, 27), (10, 10), (125, 35), (10, 46), (14, 26)),
    *((127, 14), (26, 6), (68, 48), (114, 8), (168, 16), (22, 8), (60, 13), (13, 31), (24, 4), (126, 23)),
    *((27, 16), (65, 15), (16, 75), (82, 47), (43, 43), (72, 40), (138, 27), (17, 20), (21, 52), (88, 48)),
    *((17, 97), (24, 22), (15, 28), (92, 17)),
)
"""(prompt, answer) of 64 conversations drawn from Anthropic's HH-RLHF (harmless), in the embedded model's
tokens."""
NO_MOVE = 1e-10
"""A learning rate that leaves float32 weights as they are."""
CLIPRANGE = 0.2
Precision = Literal["mixed", "float32"]
Update = Callable[[], tuple[float, float]]
"""Trains on the batch once; -> loss and gradient norm."""
TOLERANCE: dict[Precision, tuple[float, float]] = {"mixed": (2e-2, math.inf), "float32": (1e-5, 1e-4)}
"""(absolute, of the loss; relative, of the gradient's norm) by which two arms may differ."""


def model_of(options: Options) -> ModelSection:
    """The model asked for; for a quick run without a wish, two random layers in the shape of the embedded
    one."""
    if options.model is not None or not options.quick:
        return ModelSection(path=options.model or EMBEDDED_MODEL)
    folder = options.folder / "tiny"
    if not folder.exists():
        source = materialise(ModelSection())
        shape = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        config = AutoConfig.from_pretrained(source, **shape, **heads, initializer_range=0.1)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return ModelSection(path=str(folder))


def precision_of(options: Options) -> Precision:
    """As training does here by itself; a quick run asks whether the arms agree, and float32 answers that
    best."""
    return "mixed" if multiplies_bfloat16() and not options.quick else "float32"


def lengths_of(options: Options) -> tuple[tuple[int, int], ...]:
    return LENGTHS[:12] if options.quick else without_bfloat16_half(LENGTHS)


def without_bfloat16_half(lengths: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """An update of them takes half a minute there."""
    return lengths if multiplies_bfloat16() else lengths[: len(lengths) // 2]


def worker_spec(training: TrainingSection, section: OnlineSection) -> WorkerSpec:
    return WorkerSpec(section.optimizer, training, the_world(), total_steps=1, seed=0)


_WORLDS: list[World] = []


def the_world() -> World:
    """One rank, the only one of this process: it can join but once."""
    if not _WORLDS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        use_gpu = torch.cuda.is_available()
        _WORLDS.append(World(0, 1, f"127.0.0.1:{port}", torch.get_num_threads(), use_gpu))
    return _WORLDS[0]


def online_section() -> OnlineSection:
    """GRPO's loss without KL: that is in the reward, so that the old log-probs are those of the batch."""
    return OnlineSection.model_validate(
        {
            "algorithm": "grpo",
            "dataset": {"path": "prompts.jsonl"},
            "rewards": [{"type": "length", "max_tokens": 64}],
            "num_steps": 1,
            "num_generations": 2,
            "kl_coef": 0.05,
            "kl_placement": "reward",
            "cliprange": CLIPRANGE,
            "optimizer": {"learning_rate": NO_MOVE},
        }
    )


def rollouts_of(lengths: Sequence[tuple[int, int]], vocabulary: int, num_generations: int = 1) -> Rollouts:
    """Random tokens in prompts and answers of these lengths; the answers to a prompt take theirs from the
    list's next entries."""
    generator = np.random.default_rng(0)
    num_prompts = len(lengths) // num_generations
    groups = np.repeat(np.arange(num_prompts), num_generations)
    prompts = [generator.integers(3, vocabulary, lengths[group][0]) for group in range(num_prompts)]
    answers = [generator.integers(3, vocabulary, length) for _, length in lengths[: len(groups)]]
    responses = Ragged.from_rows(answers, np.int32)
    zeros = responses.with_values(np.zeros(len(responses.values), dtype=np.float32))
    count = len(groups)
    return Rollouts(
        prompt_ids=groups,
        sample_ids=np.arange(count) % num_generations,
        prompts=Ragged.from_rows([prompts[group] for group in groups], np.int32),
        responses=responses,
        logprobs=zeros,
        versions=responses.with_values(np.zeros(len(responses.values), dtype=np.int32)),
        is_sampled=responses.with_values(np.ones(len(responses.values), dtype=np.bool_)),
        turn_rewards=zeros,
        finished=np.ones(count, dtype=np.bool_),
        failures=(None,) * count,
        columns=({},) * count,
        messages=((),) * count,
    )


def rl_batch(rollouts: Rollouts, old_logprobs: Ragged) -> RLBatch:
    """With one random advantage an answer, and the old log-probs a little off, so that some ratios clip."""
    generator = np.random.default_rng(1)
    responses = rollouts.responses
    per_answer = generator.standard_normal(len(responses)).astype(np.float32)
    noise = 0.15 * generator.standard_normal(len(responses.values)).astype(np.float32)
    old = old_logprobs.with_values(old_logprobs.values.astype(np.float32) + noise)
    zeros = old.with_values(np.zeros_like(old.values))
    return RLBatch(
        prompt_ids=rollouts.prompt_ids,
        prompts=rollouts.prompts,
        responses=responses,
        old_logprobs=old,
        ref_logprobs=old,
        values=zeros,
        advantages=old.with_values(per_answer[responses.row_ids]),
        returns=zeros,
        importance_weights=old.with_values(np.ones_like(old.values)),
        is_trained=old.with_values(np.ones(len(old.values), dtype=np.bool_)),
    )


def num_tokens(batch: RLBatch | Rollouts) -> int:
    return len(batch.prompts.values) + len(batch.responses.values)


@dataclass
class Updates:
    """Runs of one arm.

    Fields:
        tokens: real ones, prompt and answer, of a batch.
    """

    update: Update
    tokens: int
    precision: Precision
    expected: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self) -> float:
        """Tokens a second of one update."""
        _synchronise()
        began = time.perf_counter()
        found = self.update()
        _synchronise()
        seconds = time.perf_counter() - began
        self.expected[:] = self.expected or [found]
        assert_alike(found, self.expected[0], self.precision)
        return self.tokens / seconds


def pair_of_arms(
    ours: Update,
    baseline: Update,
    tokens: int,
    precision: Precision,
) -> tuple[Updates, Updates]:
    """Both hold all their runs to the first of them."""
    first: list[tuple[float, float]] = []
    return Updates(ours, tokens, precision, first), Updates(baseline, tokens, precision, first)


def assert_same_update(arms: tuple[Update, Update]) -> None:
    """Of arms in float32."""
    ours, baseline = arms
    assert_alike(ours(), baseline(), "float32")


def assert_alike(found: tuple[float, float], expected: tuple[float, float], precision: Precision) -> None:
    of_loss, of_norm = TOLERANCE[precision]
    assert abs(found[0] - expected[0]) <= of_loss, f"losses differ: {found[0]} and {expected[0]}"
    assert abs(found[1] - expected[1]) <= of_norm * abs(expected[1]), f"gradients: {found[1]}, {expected[1]}"


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def our_update(worker: PolicyWorker, batch: RLBatch) -> Update:
    def update() -> tuple[float, float]:
        metrics = worker.train_rl(batch, step=0, kl_coef=0.0)
        return metrics["policy/loss"], metrics["policy/grad_norm"]

    return update


Logprobs = Callable[[nn.Module, RLBatch, torch.device], torch.Tensor]
"""(model, rows of a micro-batch) -> [R] log-probs of their answers, with gradient."""


class BareDeepSpeed:
    """A plain loop: forward, loss, `engine.backward`, `engine.step`, with nothing else around them.

    Args:
        wrap: makes of the language model the module that is trained.
    """

    def __init__(
        self,
        model: ModelSection,
        training: TrainingSection,
        wrap: Callable[[PreTrainedModel], nn.Module] = lambda model: model,
    ) -> None:
        import deepspeed

        self.device, self.training = the_world().device, training
        module = wrap(load_policy_model(model)).to(self.device)
        adam = torch.optim.AdamW(module.parameters(), lr=NO_MOVE, betas=(0.9, 0.95), weight_decay=0.0)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=adam,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "managed_gradient_accumulation": False,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": 1.0,
                "zero_optimization": {"stage": training.zero_stage, "overlap_comm": False},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 1 << 30,
            },
        )
        self.engine.train()

    def update(self, micro_batches: Sequence[RLBatch], logprobs: Logprobs) -> tuple[float, float]:
        """The clipped surrogate, mean over answers of the mean over their tokens (GRPO)."""
        num_answers = sum(len(rows) for rows in micro_batches)
        total = 0.0
        for rows in micro_batches:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.training.uses_bfloat16):
                loss = self._loss(logprobs(self.engine, rows, self.device), rows) / num_answers
            self.engine.backward(loss)
            total += loss.item()
        self.engine.step()
        return total, float(self.engine.get_global_grad_norm())

    def _loss(self, logprobs: torch.Tensor, rows: RLBatch) -> torch.Tensor:
        lengths = rows.responses.lengths
        old, advantages, weights = (
            torch.as_tensor(values, device=self.device)
            for values in (rows.old_logprobs.values, rows.advantages.values, np.repeat(1 / lengths, lengths))
        )
        ratio = torch.exp(logprobs - old)
        clipped = ratio.clamp(1 - CLIPRANGE, 1 + CLIPRANGE)
        return -(torch.minimum(ratio * advantages, clipped * advantages) * weights).sum()
