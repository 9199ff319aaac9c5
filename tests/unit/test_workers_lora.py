"""Workers that train adapters: every ZeRO stage against peft in plain PyTorch; folders, states, the loop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from launch.memory import model_size, trained_memory
from rlhf_ray.config.schema import (
    LoraSection,
    ModelSection,
    OptimizerSection,
    RewardSection,
    SyncSection,
    TrainingSection,
)
from rlhf_ray.engines.deepspeed_engine import World
from rlhf_ray.errors import CheckpointError
from rlhf_ray.loops.online import OnlineLoop
from rlhf_ray.reporting.progress import Progress
from rlhf_ray.types import PairBatch, Ragged, Rollouts
from rlhf_ray.workers.model_worker import ModelWorker
from rlhf_ray.workers.policy import PolicyWorker
from rlhf_ray.workers.scalar import RewardTrainerWorker
from tests.fakes import PowerCut, Watcher, cut_power
from tests.local_roles import LocalPolicy, logged, online_roles, online_section, stage_run, weights_of
from tests.ranks import run_ranks, worker_spec
from tests.samples import prompts_of, random_rollouts
from tests.tiny import tiny_model_folder
from tests.unit.test_deepspeed_engine import batch, distance, first_moments

STAGES = [0, 1, 2, 3]
LORA = LoraSection(rank=96, alpha=96)
"""Of so high a rank, and in so wide a model, that ZeRO-3 keeps no matrix whole."""
RATE = OptimizerSection(learning_rate=2e-3, max_grad_norm=1e6)
BATCHES = (batch(0), batch(1))
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"), hidden=128)))


def training(zero_stage: int, lora: LoraSection = LORA, **options: object) -> TrainingSection:
    return TrainingSection(
        **{
            "precision": "float32",
            "zero_stage": zero_stage,
            "tokens_per_micro_batch": 120,
            "lora": lora,
            **options,
        }
    )


def worker(
    model: ModelSection, section: TrainingSection, world: World | None = None, seed: int = 0
) -> PolicyWorker:
    return PolicyWorker(model, worker_spec(section, RATE, world, seed=seed), online_section())


def adapters_of(trained: ModelWorker) -> Arrays:
    return {name: tensor.numpy().copy() for name, tensor in trained.engine.trained_state_dict().items()}


def logprobs(network: torch.nn.Module, rollouts: Rollouts) -> np.ndarray:
    """Of the responses, one row at a time, by a model of any library."""
    found = []
    for prompt, response in zip(rollouts.prompts, rollouts.responses, strict=True):
        ids = torch.tensor([*prompt.tolist(), *response.tolist()])
        with torch.no_grad():
            rows = network(ids[None]).logits[0, :-1].log_softmax(-1)
        found.append(rows[torch.arange(len(ids) - 1), ids[1:]][len(prompt) - 1 :])
    return torch.cat(found).numpy()


def by_peft(model: ModelSection, start: Arrays) -> tuple[Arrays, Arrays, Arrays]:
    """The same steps by peft in plain PyTorch: Adam's first moments, adapters, and the merged weights."""
    base = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    config = LoraConfig(
        r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    network = get_peft_model(base, config)
    own = {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }
    assert own.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.from_numpy(start[name]))
    adam = torch.optim.AdamW(own.values(), lr=RATE.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for each in BATCHES:
        total = torch.zeros(())
        for ids, mask in zip(each.tokens, each.is_target, strict=True):
            tokens, is_target = torch.tensor(ids.tolist()), torch.tensor(mask.tolist())
            losses = F.cross_entropy(network(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
            total = total + losses[is_target[1:]].sum()
        adam.zero_grad()
        (total / int(each.is_target.values.sum())).backward()
        adam.step()
    moments = {name: adam.state[p]["exp_avg"].reshape(-1).numpy().copy() for name, p in own.items()}
    adapters = {name: p.detach().numpy().copy() for name, p in own.items()}
    merged = {name: p.detach().numpy() for name, p in network.merge_and_unload().named_parameters()}
    return moments, adapters, merged


def by_worker(trained: PolicyWorker) -> tuple[Arrays, Arrays, Arrays]:
    """Two steps, with the reference asked before each, which must not disturb them."""
    rollouts, seen = random_rollouts([(5, 6), (3, 9), (7, 2)]), []
    for each in BATCHES:
        seen.append(trained.reference_logprobs(rollouts, 1.0).values)
        trained.train_sft(each)
    seen.append(trained.reference_logprobs(rollouts, 1.0).values)
    assert np.array_equal(seen[0], seen[1]) and np.array_equal(seen[0], seen[2])
    assert np.abs(trained.logprobs(rollouts).values - seen[0]).mean() > 0.05
    return first_moments(trained), adapters_of(trained), weights_of(trained)


def assert_same_training(
    found: tuple[Arrays, Arrays, Arrays], expected: tuple[Arrays, Arrays, Arrays]
) -> None:
    # Two steps: at the first B is zero, and A has no gradient. Adam's first step is nearly the sign of
    # the gradient, and makes much of the rounding of small ones.
    assert distance(found[0], expected[0]) < 1e-3
    assert distance(found[1], expected[1]) < 1e-3
    assert distance(found[2], expected[2]) < 2e-5


@pytest.mark.parametrize("zero_stage", STAGES)
def test_one_rank_trains_as_peft_does(model: ModelSection, zero_stage: int) -> None:
    trained = worker(model, training(zero_stage))
    expected = by_peft(model, adapters_of(trained))
    assert_same_training(by_worker(trained), expected)


@pytest.mark.parametrize("zero_stage", [1, 3])
@pytest.mark.parametrize("option", ["packing", "gradient_checkpointing"])
def test_packing_and_checkpointing_change_nothing(model: ModelSection, zero_stage: int, option: str) -> None:
    trained = worker(model, training(zero_stage, **{option: True}))
    expected = by_peft(model, adapters_of(trained))
    assert_same_training(by_worker(trained), expected)


def on_two_ranks(world: World, model: ModelSection) -> list[tuple[Arrays, Arrays, Arrays]]:
    return [by_worker(worker(model, training(stage), world)) for stage in (0, 1, 3)]


def test_two_ranks_train_as_peft_does(model: ModelSection, tmp_path: Path) -> None:
    """Each rank draws its adapters itself: were they not alike, the gradients would not be."""
    ranks = run_ranks(on_two_ranks, 2, tmp_path, model)
    expected = by_peft(model, adapters_of(worker(model, training(0))))
    for first, second in zip(*ranks, strict=True):
        assert_same_training(first, expected)
        assert distance(second[0], expected[0]) < 1e-3


def test_weight_decay_takes_adapters_alone(model: ModelSection) -> None:
    """No norm or bias is trained, so one of the optimizer's two groups would be empty."""
    optimizer = RATE.model_copy(update={"weight_decay": 0.5})
    trained = PolicyWorker(model, worker_spec(training(1), optimizer))
    before = weights_of(trained)
    trained.train_sft(batch(0))
    after = weights_of(trained)
    assert np.array_equal(before["model.norm.weight"], after["model.norm.weight"])
    assert np.abs(
        before["model.layers.0.mlp.up_proj.weight"] - after["model.layers.0.mlp.up_proj.weight"]
    ).max()


@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_resumed_update_is_the_same_to_the_last_bit(
    model: ModelSection, tmp_path: Path, zero_stage: int
) -> None:
    section = training(zero_stage, precision="mixed")
    trained = worker(model, section)
    for each in BATCHES:
        trained.train_sft(each)
    trained.save_state(tmp_path)
    expected = [trained.train_sft(batch(seed)) for seed in (3, 4)]
    resumed = worker(model, section, seed=9)
    resumed.load_state(tmp_path)
    assert [resumed.train_sft(batch(seed)) for seed in (3, 4)] == expected
    ours, theirs = weights_of(resumed), weights_of(trained)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_state_holds_what_is_trained_and_not_the_frozen_model(tmp_path: Path, zero_stage: int) -> None:
    wide = ModelSection(path=str(tiny_model_folder(tmp_path / "model", tied=False)))
    trained = worker(wide, training(zero_stage, LoraSection(rank=4)))
    trained.train_sft(batch(0))
    trained.save_state(tmp_path / "state")
    size = sum(path.stat().st_size for path in (tmp_path / "state" / "state").iterdir())
    weights = sum(p.nbytes for p in weights_of(trained).values())
    adapters = sum(p.nbytes for p in adapters_of(trained).values())
    assert 3 * adapters < size < weights


def test_a_state_of_other_adapters_is_refused(model: ModelSection, tmp_path: Path) -> None:
    worker(model, training(1)).save_state(tmp_path)
    for lora in (LoraSection(rank=96, alpha=16), None):
        with pytest.raises(CheckpointError, match=r"training\.lora=.*'alpha': 96.*of the first run"):
            worker(model, training(1, lora)).load_state(tmp_path)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_the_folders_hold_the_trained_policy(model: ModelSection, tmp_path: Path, zero_stage: int) -> None:
    trained = worker(model, training(zero_stage))
    for each in BATCHES:
        trained.train_sft(each)
    trained.save_model(tmp_path)
    rollouts = random_rollouts([(5, 6), (3, 9)])
    live = trained.logprobs(rollouts).values
    start = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    assert np.abs(logprobs(start, rollouts) - live).mean() > 0.05
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    np.testing.assert_allclose(logprobs(merged, rollouts), live, atol=2e-5)
    adapted = PeftModel.from_pretrained(start, tmp_path / "adapter")
    np.testing.assert_allclose(logprobs(adapted, rollouts), live, atol=2e-5)
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    np.testing.assert_allclose(logprobs(found, rollouts), live, atol=2e-5)


def pairs() -> PairBatch:
    rollouts = random_rollouts([(5, 6), (3, 9), (4, 4), (6, 3)])
    sequences = rollouts.sequences
    halves = [sequences.select(rows) for rows in ([0, 1], [2, 3])]
    return PairBatch(np.array([3, 3]), halves[0], halves[1], np.zeros(2, np.float32), np.ones(2, np.float32))


def scores(network: PreTrainedModel | PeftModel, rows: Ragged) -> list[float]:
    """Of the last token, which is EOS here, and which the library would leave out as padding."""
    network.config.pad_token_id = None
    with torch.no_grad():
        return [network(torch.tensor(row.tolist())[None]).logits.item() for row in rows]


def test_the_folders_hold_the_trained_reward_model_with_its_head(model: ModelSection, tmp_path: Path) -> None:
    dataset = {"path": "pairs.jsonl"}
    trained = RewardTrainerWorker(
        model, worker_spec(training(1), RATE), RewardSection.model_validate({"dataset": dataset})
    )
    head = weights_of(trained)["score.weight"]
    for _ in range(3):
        trained.train_pairs(pairs())
    assert np.abs(weights_of(trained)["score.weight"] - head).max() > 1e-3
    trained.save_model(tmp_path)
    live = trained.score_pairs(pairs())[0].values
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert scores(merged, pairs().chosen) == pytest.approx(live.tolist(), abs=1e-5)
    base = AutoModelForSequenceClassification.from_pretrained(model.path, num_labels=1, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert scores(adapted, pairs().chosen) == pytest.approx(live.tolist(), abs=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["task_type"]) == (["score"], "SEQ_CLS")


def online_loop(
    model: ModelSection, folder: Path, section: TrainingSection, progress: Progress | None = None
) -> OnlineLoop:
    online = online_section(optimizer={"learning_rate": 2e-3}, kl_target=1.0)
    run = stage_run(folder, progress, every=1)
    rewards = [(each, None) for each in online.rewards]
    return OnlineLoop(
        section=online,
        sync=SyncSection(verify_first=2, verify_every=2),
        roles=online_roles(online, model, run.folder.rollouts, rewards, section),
        prompts=prompts_of("boil an egg", "the capital", "a train", "soft yolk"),
        held_out=prompts_of("the journey"),
        run=run,
        starts_at_reference=True,
    )


def train(loop: OnlineLoop) -> Arrays:
    try:
        loop.train()
    finally:
        loop.run.close()
    assert isinstance(loop.roles.policy, LocalPolicy)
    return weights_of(loop.roles.policy.worker)


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "float32"), (3, "float32"), (1, "mixed")])
def test_the_policy_is_its_own_reference_in_ppo(
    model: ModelSection, tmp_path: Path, zero_stage: int, precision: str
) -> None:
    train(online_loop(model, tmp_path, training(zero_stage, precision=precision)))
    first, *later = logged(tmp_path)
    assert first["kl/per_token"] == 0.0 and first["kl/per_sequence"] == 0.0
    assert first["policy/ratio"] == pytest.approx(1.0, abs=1e-2)
    assert all(abs(float(row["kl/per_sequence"])) > 0.01 for row in later)
    # The engine follows: what it says of its own samples is what the trainer says.
    limit = 1e-4 if precision == "float32" else 0.2
    assert all(float(row["mismatch/logprob_diff_max"]) < limit for row in [first, *later])


def test_ppo_with_adapters_resumes_as_if_it_had_not_stopped(model: ModelSection, tmp_path: Path) -> None:
    section = training(1)
    whole = train(online_loop(model, tmp_path / "whole", section))
    with pytest.raises(PowerCut):
        train(online_loop(model, tmp_path / "cut", section, Watcher(1, cut_power)))
    resumed = train(online_loop(model, tmp_path / "cut", section))
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert all(np.array_equal(resumed[name], whole[name]) for name in whole)


def test_memory_is_asked_for_what_is_trained(model: ModelSection) -> None:
    """Gradients take 4 bytes, 4 more on their way to other ranks, and the optimizer 12 at ZeRO 1, a trained
    parameter."""
    size = model_size(model)
    everything = trained_memory(size, training(1, lora=None), ranks=1)
    trained = LORA.rank * 2 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256))
    assert everything - trained_memory(size, training(1), ranks=1) == 20 * (size.parameters - trained)
    only_v = LoraSection(rank=2, target_modules=("v_proj",))
    assert size.trained(only_v) == 2 * 2 * (128 + 64)
