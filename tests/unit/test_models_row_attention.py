"""Packed rows whose sequences attend by themselves: the numbers of padded ones, no square over the row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf_ray.config.schema import ModelSection
from rlhf_ray.models import row_attention
from rlhf_ray.models.batching import before_responses, collate
from rlhf_ray.models.heads import BY_ROWS, PolicyModel
from rlhf_ray.models.loading import load_policy_model
from rlhf_ray.models.planning import plan_micro_batches
from rlhf_ray.models.row_attention import attend_by_rows
from rlhf_ray.types import Ragged
from tests.tiny import tiny_model_folder

CPU = torch.device("cpu")
LENGTHS = np.array([40, 3, 17, 9])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("model"))))


def rows() -> tuple[Ragged, np.ndarray]:
    generator = np.random.default_rng(0)
    sequences = Ragged.from_rows([generator.integers(3, 250, length) for length in LENGTHS], np.int32)
    return sequences, before_responses(np.array([20, 1, 5, 8]), sequences)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logprobs_and_gradients_are_those_of_padded_rows(model: ModelSection, checkpointing: bool) -> None:
    sequences, is_source = rows()
    weights = torch.randn(int(is_source.sum()), generator=torch.Generator().manual_seed(1))
    found = []
    for layout in ("padded", "packed"):
        network = load_policy_model(model)
        if layout == "packed":
            assert attend_by_rows(network)
        if checkpointing:
            network.gradient_checkpointing_enable()
            network.train()
        logprobs = PolicyModel(network, 2000)(collate(sequences, is_source, layout, CPU), 0.7).logprobs
        (logprobs * weights).sum().backward()
        found.append((logprobs.detach(), {n: p.grad for n, p in network.named_parameters()}))
    (padded, expected), (packed, gradients) = found
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=2e-5)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def test_no_kernel_sees_more_than_one_sequence(model: ModelSection, monkeypatch: pytest.MonkeyPatch) -> None:
    sdpa, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def watched(module, query, key, value, mask, **options):
        seen.append((query.shape[2], key.shape[2], mask))
        return sdpa(module, query, key, value, mask, **options)

    network = load_policy_model(model)
    assert attend_by_rows(network)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", watched)
    sequences, is_source = rows()
    with torch.no_grad():
        PolicyModel(network)(collate(sequences, is_source, "packed", CPU))
    assert seen[: len(LENGTHS)] == [(length, length, None) for length in LENGTHS]


def test_padded_and_empty_batches_still_work(model: ModelSection) -> None:
    """A model that attends by rows computes what is not packed as before."""
    sequences, is_source = rows()
    network = load_policy_model(model)
    with torch.no_grad():
        before = PolicyModel(network)(collate(sequences, is_source, "padded", CPU)).logprobs
        assert attend_by_rows(network)
        after = PolicyModel(network)(collate(sequences, is_source, "padded", CPU)).logprobs
        nothing = collate(sequences.select([]), is_source[:0], "packed", CPU)
        assert len(PolicyModel(network)(nothing).logprobs) == 0
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_models_that_cannot_stay_as_they_are(model: ModelSection) -> None:
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    windows = MistralForCausalLM(MistralConfig(**shape, **heads, sliding_window=500))
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1))
    eager = AutoModelForCausalLM.from_pretrained(Path(model.path), attn_implementation="eager")
    for network in (windows, recurrent, eager):
        kind = network.config._attn_implementation
        assert not attend_by_rows(network)
        assert network.config._attn_implementation == kind != BY_ROWS
    assert attend_by_rows(MistralForCausalLM(MistralConfig(**shape, **heads, sliding_window=None)))


def test_a_model_that_loses_the_lengths_is_found_out(
    model: ModelSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_rows = row_attention._by_rows

    def forgetful(*tensors, sequence_lengths, **options):
        return by_rows(*tensors, sequence_lengths=None, **options)

    monkeypatch.setattr(row_attention, "_by_rows", forgetful)
    network = load_policy_model(model)
    assert not attend_by_rows(network)
    assert network.config._attn_implementation == "sdpa"


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(1, 300),
)
def test_packed_plan(row_lengths: list[int], num_ranks: int, token_budget: int) -> None:
    lengths = np.array(row_lengths)
    plan = plan_micro_batches(lengths, num_ranks, token_budget, packed=True)
    assert len(plan) == num_ranks and len({len(batches) for batches in plan}) == 1
    flat = [batch for batches in plan for batch in batches]
    assert sorted(row for batch in flat for row in batch) == list(range(len(lengths)))
    assert all(lengths[batch].sum() <= token_budget or len(batch) == 1 for batch in flat)
    # Longest first into the emptiest: the fullest exceeds the emptiest by one row at most.
    loads = [int(lengths[batch].sum()) for batch in flat]
    assert max(loads) - min(loads) <= lengths.max()


def test_packed_plan_takes_as_few_micro_batches_as_there_is_room_for() -> None:
    (batches,) = plan_micro_batches(np.array([100, 10, 60, 30, 50, 50]), 1, 100, packed=True)
    assert sorted(sorted(batch) for batch in batches) == [[0], [1, 2, 3], [4, 5]]
