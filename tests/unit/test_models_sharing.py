"""Answers behind one shared prompt: rectangles by hand, plans, and the numbers of a model."""

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

from rlhf_ray.config.schema import ModelSection
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.batching import before_responses, collate, same_prompts
from rlhf_ray.models.heads import PolicyModel
from rlhf_ray.models.loading import load_policy_model
from rlhf_ray.models.planning import plan_micro_batches
from rlhf_ray.models.sharing import check_sharing
from rlhf_ray.types import Ragged
from tests.tiny import tiny_model_folder

CPU = torch.device("cpu")
EOS = 2
PROMPTS = Ragged.from_rows([[5, 6], [8], [5, 6], [5, 6]], np.int32)
ANSWERS = Ragged.from_rows([[7, EOS], [9, 9, EOS], [EOS], [4, 3, EOS]], np.int32)
SEQUENCES = Ragged.join(PROMPTS, ANSWERS)
SOURCES = before_responses(PROMPTS.lengths, SEQUENCES)


def test_answers_stand_behind_their_prompt() -> None:
    """Each without its last token, which nothing that is wanted sees; [EOS] has no other."""
    batch = collate(SEQUENCES, SOURCES, "shared", CPU, PROMPTS)
    assert batch.position_ids is not None and batch.answer_ids is not None
    assert batch.input_ids.tolist() == [[5, 6, 7, 4, 3], [8, 9, 9, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 0, 0]]
    assert batch.answer_ids.tolist() == [[0, 0, 1, 4, 4], [0, 2, 2, 0, 0]]
    # In the order of the sequences; the first token of every answer is predicted by its prompt's last.
    assert batch.select.tolist() == [1, 2, 5, 6, 7, 1, 1, 3, 4]
    assert batch.targets.tolist() == [7, EOS, 9, 9, EOS, EOS, 4, 3, EOS]


def test_what_shares_nothing_is_padded() -> None:
    different = SEQUENCES.select([0, 1]), PROMPTS.select([0, 1])
    is_source = before_responses(different[1].lengths, different[0])
    found = collate(different[0], is_source, "shared", CPU, different[1])
    assert found.answer_ids is None and found.position_ids is None
    assert found.input_ids.tolist() == [[5, 6, 7, EOS], [8, 9, 9, EOS]]
    assert collate(SEQUENCES, SOURCES, "shared", CPU).input_ids.shape == (4, 5), "nothing is said of prompts"
    assert (
        collate(SEQUENCES.select([]), SOURCES[:0], "shared", CPU, PROMPTS.select([])).input_ids.numel() == 1
    )


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30)), min_size=1, max_size=40),
    st.integers(1, 4),
    st.integers(1, 200),
)
def test_plan_of_groups(rows: list[tuple[int, int]], num_ranks: int, token_budget: int) -> None:
    """Rows of (prompt, answer's length), where prompt i has 3 i + 1 tokens."""
    prompts = Ragged.from_rows([[prompt] * (3 * prompt + 1) for prompt, _ in rows], np.int32)
    lengths = prompts.lengths + np.array([length for _, length in rows])
    plan = plan_micro_batches(lengths, num_ranks, token_budget, prompts)
    assert len(plan) == num_ranks
    assert len({len(batches) for batches in plan}) == 1, "ranks must stay in lockstep"
    assert sorted(row for batches in plan for batch in batches for row in batch) == list(range(len(rows)))
    sequences = Ragged.join(prompts, Ragged.from_rows([[1] * length for _, length in rows], np.int32))
    for batch in [batch for batches in plan for batch in batches if len(batch) > 1]:
        own, starts = sequences.select(batch), prompts.select(batch)
        found = collate(own, before_responses(starts.lengths, own), "shared", CPU, starts)
        # What shares nothing is padded with the last tokens, which the plan does not count.
        slack = 0 if found.answer_ids is not None else len(batch)
        assert found.input_ids.numel() <= token_budget + slack


def test_a_group_that_fits_stays_together() -> None:
    prompts = Ragged.from_rows([[prompt] * 20 for prompt in (1, 2, 3) for _ in range(4)], np.int32)
    order = np.random.default_rng(0).permutation(12)
    prompts = prompts.select(order)
    # A group of four answers of 6 tokens takes 20 + 4 * 5.
    (batches,) = plan_micro_batches(prompts.lengths + 6, 1, 80, prompts)
    groups = same_prompts(prompts)
    assert sorted(len(batch) for batch in batches) == [4, 8]
    assert [len(set(groups[batch])) for batch in batches] == [len(batch) // 4 for batch in batches]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_a_single_group_gives_every_rank_work(num_ranks: int) -> None:
    prompts = Ragged.from_rows([[1] * 20] * 8, np.int32)
    plan = plan_micro_batches(prompts.lengths + 6, num_ranks, 4096, prompts)
    counts = [sum(len(batch) for batch in batches) for batches in plan]
    assert sum(counts) == 8 and min(counts) >= 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logprobs_and_gradients_against_rows_of_their_own(model: ModelSection, checkpointing: bool) -> None:
    generator = np.random.default_rng(0)
    starts = [generator.integers(3, 290, length) for length in (6, 13, 1)]
    prompts = Ragged.from_rows([starts[i] for i in (0, 1, 0, 2, 1, 0, 0, 2)], np.int32)
    answers = [np.append(generator.integers(3, 290, n), EOS) for n in (9, 3, 0, 5, 14, 2, 9, 1)]
    rows = Ragged.join(prompts, Ragged.from_rows(answers, np.int32))
    is_source = before_responses(prompts.lengths, rows)
    weights = torch.randn(int(is_source.sum()), generator=torch.Generator().manual_seed(1))
    found = []
    for layout in ("padded", "shared"):
        network = load_policy_model(model)
        if checkpointing:
            network.gradient_checkpointing_enable()
            network.train()
        logprobs = PolicyModel(network, 2000)(collate(rows, is_source, layout, CPU, prompts), 0.7).logprobs
        (logprobs * weights).sum().backward()
        found.append((logprobs.detach(), {n: p.grad for n, p in network.named_parameters()}))
    (alone, expected), (shared, gradients) = found
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def test_a_model_with_full_attention_is_taken(model: ModelSection) -> None:
    check_sharing(load_policy_model(model))


def test_models_that_cannot_share_are_refused(model: ModelSection) -> None:
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    with pytest.raises(ConfigError, match="share_prompts=true: MistralForCausalLM has layers of sliding"):
        check_sharing(MistralForCausalLM(MistralConfig(**shape, **heads, sliding_window=500)))
    check_sharing(MistralForCausalLM(MistralConfig(**shape, **heads, sliding_window=None)))
    with pytest.raises(ConfigError, match=r"MambaForCausalLM has layers of linear_attention, .* leave"):
        check_sharing(MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1)))


def test_attention_that_does_not_take_the_mask_is_refused(model: ModelSection) -> None:
    eager = AutoModelForCausalLM.from_pretrained(
        Path(model.path), dtype=torch.float32, attn_implementation="eager"
    )
    with pytest.raises(ConfigError, match="with eager attention gives other hidden states"):
        check_sharing(eager)
