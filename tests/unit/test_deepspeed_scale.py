"""What lets large models train, against training without it: offload, resting, sequences that ranks share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.config.schema import LoraSection, ModelSection
from rlhf_ray.engines.deepspeed_engine import World
from rlhf_ray.errors import ModelError
from tests.local_roles import weights_of
from tests.ranks import run_ranks
from tests.tiny import tiny_model_folder
from tests.unit.test_deepspeed_engine import (
    BATCHES,
    BUDGETS,
    CLIPPING,
    NO_CLIPPING,
    Outcome,
    assert_equal_outcomes,
    batch,
    distance,
    plain,
    train,
    worker,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


@pytest.mark.parametrize(
    "options",
    [
        {"zero_stage": 1, "offload_optimizer": "cpu"},
        {"zero_stage": 2, "offload_optimizer": "cpu"},
        {"zero_stage": 3, "offload_optimizer": "cpu"},
        {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    ],
)
def test_offloading_changes_nothing(model: ModelSection, options: dict[str, object]) -> None:
    found = train(worker(model, budget=BUDGETS["2x4"], optimizer=CLIPPING, **options), BATCHES)  # type: ignore[arg-type]
    assert_equal_outcomes(found, plain(model, CLIPPING, BATCHES))


@pytest.mark.parametrize(
    "options",
    [
        {"zero_stage": 1},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 2, "offload_optimizer": "cpu"},
        {"zero_stage": 3, "offload_optimizer": "cpu"},
        {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
        {"zero_stage": 2, "lora": LoraSection(rank=4)},
    ],
)
def test_resting_between_steps_changes_nothing(model: ModelSection, options: dict[str, object]) -> None:
    """Log-probs, steps and what is published, after resting at every point where a turn may end."""
    steady, resting = (worker(model, budget=BUDGETS["2x4"], **options) for _ in range(2))  # type: ignore[arg-type]
    for seed in range(3):
        resting.rest()
        resting.wake()
        assert resting.train_sft(batch(seed)) == steady.train_sft(batch(seed))
        resting.rest()
        resting.wake(weights_only=False)
        ours, theirs = weights_of(resting), weights_of(steady)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
        probe = batch(9).tokens
        assert np.array_equal(resting.probe(probe).values, steady.probe(probe).values)


def train_sharing_sequences(
    world: World, model: ModelSection, layouts: list[tuple[int, str]]
) -> dict[tuple[int, str], tuple[Outcome, np.ndarray]]:
    found = {}
    for zero_stage, split in layouts:
        # Odd lengths are filled up to a multiple of the ranks; of one short row a rank selects nothing.
        batches = BATCHES if split != "one row" else [each.select([1]) for each in BATCHES]
        trained = worker(
            model,
            zero_stage,
            BUDGETS.get(split, 64),
            NO_CLIPPING,
            world,
            sequence_parallel_size=2,
            gradient_checkpointing=split == "8x1",
        )
        probe = trained.probe(batch(9).tokens).values  # while the weights are equal
        found[zero_stage, split] = train(trained, batches), probe
    return found


def assert_close_outcomes(found: Outcome, expected: Outcome) -> None:
    """Attention over exchanged heads adds up in another order: of a row of three tokens, the gradients of
    queries and keys, which nearly cancel, were seen to differ by 2e-6."""
    assert distance(found.gradients, expected.gradients) < 1e-5
    assert found.metrics["policy/grad_norm"] == pytest.approx(expected.metrics["policy/grad_norm"], rel=1e-5)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert distance(found.weights, expected.weights) < 1e-5


def assert_sharing_changes_nothing(
    model: ModelSection, folder: Path, size: int, layouts: list[tuple[int, str]]
) -> None:
    ranks = run_ranks(train_sharing_sequences, size, folder, model, layouts)
    for zero_stage, split in layouts:
        batches = BATCHES if split != "one row" else [each.select([1]) for each in BATCHES]
        alone = worker(model, 0)
        probe = alone.probe(batch(9).tokens).values
        expected = train(alone, batches)
        assert_close_outcomes(ranks[0][zero_stage, split][0], expected)
        for rank in ranks:
            outcome, own_probe = rank[zero_stage, split]
            assert outcome.metrics == ranks[0][zero_stage, split][0].metrics, "ranks agree"
            np.testing.assert_allclose(own_probe, probe, atol=1e-5)


def test_two_ranks_that_share_sequences_are_one(model: ModelSection, tmp_path: Path) -> None:
    """The same loss, gradient and log-probs, of rows that each rank has half of."""
    assert_sharing_changes_nothing(model, tmp_path, 2, [(1, "1x8"), (3, "8x1"), (1, "one row")])


@pytest.mark.slow
def test_two_pairs_of_ranks_that_share_sequences_are_one(model: ModelSection, tmp_path: Path) -> None:
    layouts = [(stage, split) for stage in (0, 1, 2, 3) for split in ("1x8", "2x4", "8x1")]
    assert_sharing_changes_nothing(model, tmp_path, 4, layouts)


def test_ranks_that_cannot_divide_the_heads_are_refused(model: ModelSection, tmp_path: Path) -> None:
    (first, *_) = run_ranks(refusal_of_three, 3, tmp_path, model)
    assert first.startswith("training.sequence_parallel_size=3: not with this model (LlamaForCausalLM, ")
    assert "4 is not divisible by SP size 3" in first


def refusal_of_three(world: World, model: ModelSection) -> str:
    with pytest.raises(ModelError) as caught:
        worker(model, 1, world=world, sequence_parallel_size=3)
    return str(caught.value)


def test_attention_that_is_not_installed_is_named(model: ModelSection) -> None:
    with pytest.raises(ModelError, match=r"^training\.attention=flash_attention_3: is not to be had here "):
        worker(model, 1, attention="flash_attention_3")


def test_attention_by_name(model: ModelSection) -> None:
    named = worker(model, 1, attention="sdpa")
    assert named.engine.module.model.config._attn_implementation == "sdpa"
    assert_equal_outcomes(train(named, BATCHES), train(worker(model, 1), BATCHES))
