"""The frozen reward sources: weights, values that do not apply, and one format for training and scoring."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_ray.config.schema import FunctionReward, ModelReward, ModelSection, Reward, RewardSection
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.encoding import encode_pairs
from rlhf_ray.data.formats import PreferenceExample
from rlhf_ray.errors import RewardError
from rlhf_ray.models.loading import (
    eos_token_ids,
    load_policy_model,
    load_scalar_model,
    load_tokenizer,
    save_model_folder,
)
from rlhf_ray.types import Ragged, Rollouts
from rlhf_ray.workers.rewards import RewardWorker
from rlhf_ray.workers.scalar import RewardTrainerWorker
from tests.local_roles import reward_worker
from tests.ranks import EXACT, worker_spec
from tests.samples import rollouts_of
from tests.tiny import tiny_model_folder, tiny_tokenizer

PROMPT = ({"role": "user", "content": "How do I boil an egg?"},)
ANSWERS = ["Place the egg in water.", "no"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def reward_model(model: ModelSection, tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    """A saved reward model with a random head."""
    folder = tmp_path_factory.mktemp("reward")
    network = load_scalar_model(model, seed=1)
    save_model_folder(network, dict(network.named_parameters()), load_tokenizer(model), folder)
    return ModelSection(path=str(folder))


def function(name: str, weight: float = 1.0) -> tuple[Reward, None]:
    return FunctionReward(type="function", name=name, function=f"tests.fakes:{name}", weight=weight), None


def worker(model: ModelSection, *sources: tuple[Reward, ModelSection | None]) -> RewardWorker:
    return reward_worker(model, sources)


def texts(*answers: str) -> Rollouts:
    tokenizer = tiny_tokenizer()
    encoded = [[*tokenizer(answer)["input_ids"], 2] for answer in answers]
    return rollouts_of([[1, 30]] * len(answers), encoded)


def test_total_is_the_weighted_sum(model: ModelSection) -> None:
    sources = function("num_vowels", 2.0), function("num_characters", -0.5), function("last_user_turn", 0.0)
    scores = worker(model, *sources).score(texts("audio", "xyz"))
    # "audio" has 4 vowels and 5 characters; the watched source, of weight 0, adds nothing.
    assert scores.total.tolist() == [2 * 4 - 0.5 * 5, 2 * 0 - 0.5 * 3]
    assert scores.total.dtype == np.float32
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "num_vowels": [4.0, 0.0],
        "num_characters": [5.0, 3.0],
        "last_user_turn": [10.0, 10.0],
    }


def test_what_does_not_apply_adds_nothing(model: ModelSection) -> None:
    sources = function("only_short", 3.0), function("num_characters", 1.0)
    scores = worker(model, *sources).score(texts("abc", "audio"))
    assert scores.total.tolist() == [3.0 + 3.0, 5.0]
    assert np.isnan(scores.parts["only_short"]).tolist() == [False, True]


def test_a_failure_names_its_source(model: ModelSection) -> None:
    with pytest.raises(RewardError, match="reward 'raises' raised KeyError"):
        worker(model, function("num_vowels"), function("raises")).score(texts("a"))


def model_source(reward_model: ModelSection, weight: float = 1.0) -> tuple[Reward, ModelSection]:
    return ModelReward(type="model", name="proxy", weight=weight), reward_model


@torch.no_grad()
def slow_score(reward_model: ModelSection, ids: list[int]) -> float:
    network = load_scalar_model(reward_model, seed=0)
    return float(network.score(network.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0])


def test_model_scores_what_was_sampled_and_ends_what_was_cut(
    model: ModelSection, reward_model: ModelSection
) -> None:
    """The EOS (here also the pad token) is read; a response that the length limit cut gets one."""
    rollouts = rollouts_of([[1, 30], [1, 31, 32]], [[40, 41, 2], [50, 51]], finished=[True, False])
    scores = worker(model, model_source(reward_model, 0.5)).score(rollouts)
    expected = [
        slow_score(reward_model, [1, 30, 40, 41, 2]),
        slow_score(reward_model, [1, 31, 32, 50, 51, 2]),
    ]
    np.testing.assert_allclose(scores.parts["proxy"], expected, rtol=1e-5)
    np.testing.assert_allclose(scores.total, 0.5 * np.array(expected), rtol=1e-5)
    alone = [
        worker(model, model_source(reward_model)).score(rollouts.select([row])).total[0] for row in (0, 1)
    ]
    np.testing.assert_allclose(alone, expected, rtol=1e-5)


def test_training_and_scoring_read_the_same_ids(model: ModelSection, reward_model: ModelSection) -> None:
    """What the formatter writes for a pair is what is scored when the policy samples these answers."""
    tokenizer = load_tokenizer(model)
    formatter = ChatFormatter(tokenizer, eos_token_ids(model, tokenizer))
    pairs, _ = encode_pairs([PreferenceExample(0, PROMPT, *ANSWERS, 0.0, {})], formatter, 512)
    prompt = formatter.prompt_ids(PROMPT)
    responses = [pairs.chosen[0][len(prompt) :], pairs.rejected[0][len(prompt) :]]
    assert responses[0].tolist() == [*tokenizer(ANSWERS[0])["input_ids"], 2]
    trainer = RewardTrainerWorker(reward_model, worker_spec(), RewardSection())
    chosen, rejected = trainer.score_pairs(pairs)
    for finished, sampled in ((True, responses), (False, [row[:-1] for row in responses])):
        rollouts = rollouts_of([prompt] * 2, sampled, finished=[finished] * 2)
        scores = worker(model, model_source(reward_model)).score(rollouts)
        np.testing.assert_allclose(scores.total, [chosen.values[0], rejected.values[0]], rtol=1e-5)


def test_a_cut_answer_is_ended_as_the_template_ends_answers(
    model: ModelSection, reward_model: ModelSection, tmp_path: Path
) -> None:
    """Not by the tokenizer's own EOS, where that is another one than the chat template writes."""
    folder = tmp_path / "two_eos"
    network, tokenizer = load_policy_model(model), load_tokenizer(model)
    tokenizer.eos_token = "<|endoftext|>"
    save_model_folder(network, dict(network.named_parameters()), tokenizer, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [0, 2]}))
    rollouts = rollouts_of([[1, 30]], [[40, 41]], finished=[False])
    scores = worker(ModelSection(path=str(folder)), model_source(reward_model)).score(rollouts)
    assert scores.total[0] == pytest.approx(slow_score(reward_model, [1, 30, 40, 41, 2]), rel=1e-5)


def test_a_score_that_is_not_finite_names_the_sample(model: ModelSection, reward_model: ModelSection) -> None:
    """It must not pass for "does not apply"."""
    broken = worker(model, model_source(reward_model))
    module = broken.sources["proxy"].source.model.module.model  # type: ignore[attr-defined]
    with torch.no_grad():
        module.model.embed_tokens.weight[45] = float("nan")
    rollouts = rollouts_of([[1, 30]] * 2, [[40, 2], [45, 2]], prompt_ids=[7, 8])
    with pytest.raises(RewardError, match="reward 'proxy': the model's score of sample 1 of prompt 8 is nan"):
        broken.score(rollouts)


def test_long_batches_score_alike(model: ModelSection, reward_model: ModelSection) -> None:
    """More rows than a micro-batch holds come back in their order."""
    generator = np.random.default_rng(0)
    responses = [
        [*generator.integers(3, 290, length).tolist(), 2] for length in generator.integers(1, 40, 30)
    ]
    rollouts = rollouts_of([[1, 30]] * 30, responses)
    small = EXACT.model_copy(update={"tokens_per_micro_batch": 64})
    scores = reward_worker(model, [model_source(reward_model)], small).score(rollouts)
    expected = [slow_score(reward_model, [1, 30, *row]) for row in responses]
    np.testing.assert_allclose(scores.total, expected, rtol=1e-4, atol=1e-5)
    assert isinstance(rollouts.sequences, Ragged)
