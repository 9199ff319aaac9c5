"""Placement and scale in a configuration: what fits together, and what is said where it does not."""

from __future__ import annotations

import pytest

from rlhf_ray.config.checks import check_config
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import ConfigError


def configured(*overrides: str) -> RunConfig:
    return load_config("configs/guess.yaml", ["output_dir=runs/never", *overrides])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["training.packing=true", "training.sequence_parallel_size=2"],
            "training.sequence_parallel_size=2: takes packed rows only with FlashAttention, which needs no "
            "mask; use packing: false, or attention: flash_attention_2",
        ),
        (
            ["training.share_prompts=true", "training.sequence_parallel_size=2"],
            "training.sequence_parallel_size=2: takes no mask, which would keep the answers to a prompt "
            "apart; use share_prompts: false",
        ),
        (
            ["training.share_prompts=true", "training.attention=flash_attention_2"],
            "training.attention=flash_attention_2: takes no mask, which would keep the answers to a prompt "
            "apart; use sdpa, or share_prompts: false",
        ),
        (
            ["training.offload_optimizer=cpu", "training.zero_stage=0"],
            "training.offload_optimizer=cpu: wants ZeRO; use zero_stage: 1, 2 or 3",
        ),
        (
            ["training.offload_optimizer=nvme", "training.zero_stage=2", "training.nvme_path=/fast"],
            "training.offload_optimizer=nvme: zero_stage=2 offloads to the cpu only; use cpu, or zero_stage "
            "3",
        ),
        (
            ["training.offload_parameters=cpu", "training.zero_stage=2"],
            "training.offload_parameters=cpu: at zero_stage=2 every device needs all weights; use "
            "zero_stage: 3",
        ),
        (
            ["training.offload_optimizer=nvme", "training.zero_stage=3"],
            "training.nvme_path: missing; name a folder on a fast disk of every node",
        ),
        (
            ["training.nvme_path=/fast"],
            "training.nvme_path=/fast: nothing is offloaded there; use offload_optimizer: nvme, or leave it "
            "out",
        ),
        (
            ["placement.policy.count=4", "placement.policy.nodes=3"],
            "placement.policy.nodes=3: does not divide count=4, and every node has equally many actors; "
            "change one of them",
        ),
        (
            ["placement.policy.nodes=1", "placement.policy.strategy=SPREAD"],
            "placement.policy.strategy=SPREAD: nodes=1 says it already; leave one of them out",
        ),
        (
            ["placement.engine.gpus=-1"],
            "placement.engine.gpus=-1: must be at least 0",
        ),
        (
            ["placement.mode=colocated", "placement.policy.count=2", "placement.policy.nodes=2"],
            "placement.policy: nodes=2: in mode colocated roles share devices, and have no nodes of their "
            "own; use strategy, or mode: auto",
        ),
        (
            [
                "placement.mode=colocated",
                "placement.policy.strategy=PACK",
                "placement.engine.strategy=SPREAD",
            ],
            "placement.engine: strategy=SPREAD: shares its devices with policy, whose strategy is PACK; "
            "write it once",
        ),
    ],
)
def test_what_does_not_fit_together_is_said(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(*overrides)
    assert len(caught.value.mistakes) == 1
    assert caught.value.mistakes[0].endswith(sentence)


def test_what_fits_together_is_taken() -> None:
    config = configured(
        "placement.mode=disaggregated",
        "placement.policy={count: 16, strategy: PACK, labels: {pool: train}}",
        "placement.critic.count=16",
        "placement.reference.count=8",
        "placement.reward.count=8",
        "placement.engine={count: 4, labels: {pool: generate}, strategy: SPREAD}",
        "training.zero_stage=3",
        "training.offload_optimizer=nvme",
        "training.offload_parameters=cpu",
        "training.nvme_path=/fast",
        "training.sequence_parallel_size=4",
        "training.attention=flash_attention_2",
        "training.packing=true",
        "engine.tensor_parallel_size=4",
    )
    placement = config.placement
    assert placement.policy.labels == {"pool": "train"}
    assert [placement.pool_of(role) for role in ("policy", "critic", "reward", "engine")] == [
        *["training"] * 3,
        "generation",
    ]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["placement.policy.count=4", "training.sequence_parallel_size=3"],
            "training.sequence_parallel_size=3: does not divide placement.policy.count=4, and so many ranks "
            "share a sequence; change one of them",
        ),
        (
            ["placement.mode=colocated", "online.max_lag=1", "training.zero_stage=1"],
            "placement.mode=colocated: with online.max_lag=1 the engines work beside the trainer, and here "
            "they sleep while it works; use disaggregated, or max_lag: 0",
        ),
        (
            ["placement.mode=colocated", "training.zero_stage=0"],
            "placement.mode=colocated: waiting models move to main memory, which DeepSpeed does from ZeRO 1 "
            "on; use training.zero_stage: 1, 2 or 3",
        ),
        (
            ["placement.mode=disaggregated", "training.zero_stage=3", "training.offload_parameters=cpu"],
            "placement.mode=disaggregated: DeepSpeed moves no optimizer beside "
            "training.offload_parameters=cpu; use offload_optimizer too",
        ),
        (
            [
                "training.zero_stage=3",
                "training.offload_optimizer=nvme",
                "training.nvme_path=/no/such/disk",
            ],
            "training.nvme_path=/no/such/disk: no such folder here; make it on every node",
        ),
        (
            ["placement.reward.count=2"],
            "placement.reward.count=2: none of online.rewards is of type model or ensemble, and only models "
            "are held in parts; use 1",
        ),
        (
            ["placement.reward.backend=vllm"],
            "placement.reward.backend=vllm: an engine serves one reward model, and online.rewards must have "
            "exactly one, of type model; use torch",
        ),
        (
            ["placement.reference.backend=vllm", "online.temperature=0.7"],
            "placement.reference.backend=vllm: vLLM gives log-probs of given tokens at temperature 1 alone, "
            "and online.temperature=0.7; use torch, or temperature: 1",
        ),
        (
            ["placement.reference.backend=vllm", "online.temperature=1", "training.lora.rank=4"],
            "placement.reference.backend=vllm: with training.lora the policy without its adapters is the "
            "reference, and no other is started; leave it out, or name another model in online.reference",
        ),
        (
            [
                "placement.reference.backend=vllm",
                "online.temperature=1",
                "online.max_prompt_length=3000",
                "online.environment.max_episode_length=5192",
            ],
            "placement.reference.backend=vllm: vLLM samples a token behind the 8192 of the longest row of "
            "online, and the reference is made for 8192; use torch, or shorter rows",
        ),
    ],
)
def test_what_sections_ask_of_each_other(overrides: list[str], sentence: str) -> None:
    assert [mistake for mistake in check_config(configured(*overrides)) if "output_dir" not in mistake] == [
        sentence
    ]


def test_ranks_that_share_sequences_need_a_row_together() -> None:
    overrides = ["placement.policy.count=64", "training.sequence_parallel_size=2"]
    online = configured().online
    assert online is not None
    size = online.samples_per_step // online.num_mini_batches
    mistakes = check_config(configured(*overrides))
    assert (size >= 32) == (not mistakes), (size, mistakes)
    too_many = f"placement.policy.count={4 * size}"
    (mistake,) = check_config(configured(too_many, "training.sequence_parallel_size=2"))
    assert mistake.startswith(f"{too_many}: more groups of 2 ranks than a mini-batch has samples")
