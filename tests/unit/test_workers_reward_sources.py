"""Several sources at once: ensembles, reward models with their own words, failures, and who waits."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from aiohttp import web
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.schema import (
    EnsembleReward,
    FunctionReward,
    JudgeReward,
    LengthReward,
    ModelReward,
    ModelSection,
    Reward,
)
from rlhf_ray.errors import RewardError
from rlhf_ray.models.loading import load_scalar_model, load_tokenizer, save_model_folder
from rlhf_ray.rewards import failures
from rlhf_ray.rewards.failures import Outcome
from rlhf_ray.rewards.models import ModelSource
from rlhf_ray.rewards.source import Samples, Values
from rlhf_ray.types import Rollouts, Scores
from rlhf_ray.workers.rewards import RewardWorker
from tests.local_roles import CPU
from tests.ranks import EXACT
from tests.reward_servers import answering, http_section, running
from tests.samples import rollouts_of
from tests.tiny import tiny_model_folder, tiny_tokenizer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


def saved_reward_model(
    policy: ModelSection, folder: Path, seed: int, tokenizer: PreTrainedTokenizerFast | None = None
) -> ModelSection:
    """With a head wide enough that scores differ."""
    network = load_scalar_model(policy, seed=seed)
    with torch.no_grad():
        network.score.weight.mul_(30)
    save_model_folder(
        network, dict(network.named_parameters()), tokenizer or load_tokenizer(policy), folder / str(seed)
    )
    return ModelSection(path=str(folder / str(seed)))


@pytest.fixture(scope="module")
def reward_models(policy: ModelSection, tmp_path_factory: pytest.TempPathFactory) -> list[ModelSection]:
    folder = tmp_path_factory.mktemp("rewards")
    return [saved_reward_model(policy, folder, seed) for seed in (1, 2, 3)]


def worker(policy: ModelSection, *sources: tuple[Reward, tuple[ModelSection, ...]]) -> RewardWorker:
    return RewardWorker(policy, sources, EXACT, CPU, threads=1, tokens={})


def function(name: str, **options: object) -> tuple[Reward, tuple[ModelSection, ...]]:
    section = {"type": "function", "name": name.rpartition(":")[2], "function": name, **options}
    return FunctionReward.model_validate(section), ()


def texts(*answers: str) -> Rollouts:
    tokenizer = tiny_tokenizer()
    return rollouts_of([[1, 30]] * len(answers), [[*tokenizer(a)["input_ids"], 2] for a in answers])


@torch.no_grad()
def slow_score(reward_model: ModelSection, ids: list[int]) -> float:
    network = load_scalar_model(reward_model, seed=0)
    return float(network.score(network.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0])


def test_an_ensemble_is_its_members_mean_less_their_spread(
    policy: ModelSection, reward_models: list[ModelSection]
) -> None:
    rollouts = texts("six minutes", "no")
    members = np.array(
        [[slow_score(model, [1, 30, *row.tolist()]) for row in rollouts.responses] for model in reward_models]
    )
    mean = members.sum(axis=0) / 3
    spread = np.sqrt(((members - mean) ** 2).sum(axis=0) / 3)
    assert (spread > 0.05).all()
    paths = tuple(model.path for model in reward_models)
    for aggregate, expected in (("mean", mean), ("pessimistic", mean - 0.5 * spread)):
        section = EnsembleReward(type="ensemble", paths=paths, aggregate=aggregate, spread_coef=0.5, weight=2)
        scores = worker(policy, (section, tuple(reward_models))).score(rollouts)
        np.testing.assert_allclose(scores.parts["proxy"], expected, rtol=1e-4)
        np.testing.assert_allclose(scores.total, 2 * expected, rtol=1e-4)
        np.testing.assert_allclose(scores.spreads["proxy"], spread, rtol=1e-4)


def test_an_ensemble_that_fails_on_a_chunk_joins_one_that_did_not(
    policy: ModelSection, reward_models: list[ModelSection]
) -> None:
    paths = tuple(model.path for model in reward_models)
    section = EnsembleReward(type="ensemble", paths=paths, on_error="mask", max_retries=0)
    ensemble = worker(policy, (section, tuple(reward_models)))
    fine = ensemble.score(texts("egg"))
    member = ensemble.sources["proxy"].source.members[1]  # type: ignore[attr-defined]
    with torch.no_grad():
        member.model.module.model.score.weight.fill_(float("nan"))
    whole = Scores.concat([fine, ensemble.score(texts("a", "b"))])
    assert whole.is_valid.tolist() == [True, False, False]
    assert np.isnan(whole.spreads["proxy"]).tolist() == [False, True, True]


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """Another one: a token a byte, and questions and answers between other marks."""
    marks = ["[END]", "[Q]", "[A]"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*marks, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[END]", pad_token="[END]")
    fast.chat_template = (
        "{% for m in messages %}{{ ('[Q]' if m['role'] == 'user' else '[A]') + m['content'] + '[END]' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[A]' }}{% endif %}"
    )
    return fast


def test_a_reward_model_with_its_own_tokenizer_reads_text_in_its_own_format(
    policy: ModelSection, tmp_path: Path
) -> None:
    other = saved_reward_model(policy, tmp_path, 4, letters_tokenizer())
    config = Path(other.path) / "generation_config.json"
    config.unlink(missing_ok=True)
    rollouts = texts("egg", "no")
    cut = rollouts_of([[1, 30]], [rollouts.responses[0][:-1]], finished=[False])
    section = ModelReward(type="model")
    found = worker(policy, (section, (other,))).score(Rollouts.concat([rollouts, cut])).total
    own = letters_tokenizer()
    expected = [
        slow_score(other, own(f"[Q]question {n}[END][A]{text}[END]")["input_ids"])
        for n, text in ((0, "egg"), (1, "no"), (0, "egg"))
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_template_of_its_own_is_enough_to_be_read_anew(
    policy: ModelSection, reward_models: list[ModelSection], tmp_path: Path
) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    model = reward_models[0].model_copy(update={"chat_template": str(template)})
    found = worker(policy, (ModelReward(type="model"), (model,))).score(texts("egg")).total
    own = tiny_tokenizer()
    ids = own("user: question 0<|im_end|>assistant: ")["input_ids"] + own("egg")["input_ids"] + [2]
    assert found[0] == pytest.approx(slow_score(model, ids), rel=1e-4)


def test_a_masked_failure_leaves_its_samples_out_and_is_counted(policy: ModelSection) -> None:
    flaky = function("tests.slow_rewards:fails_on_bad", on_error="mask", max_retries=2)
    sources = (flaky, function("tests.fakes:num_characters"))
    failed = worker(policy, *sources).score(texts("bad", "good"))
    assert failed.is_valid.tolist() == [False, False]
    assert np.isnan(failed.parts["fails_on_bad"]).all()
    assert failed.total.tolist() == [3.0, 4.0]
    assert failed.events == {"reward/fails_on_bad/failures": 2.0, "reward/fails_on_bad/retries": 2.0}
    fine = worker(policy, *sources).score(texts("good"))
    assert fine.is_valid.tolist() == [True]
    assert fine.events == {"reward/fails_on_bad/failures": 0.0, "reward/fails_on_bad/retries": 0.0}


def test_a_failure_of_what_is_only_watched_invalidates_nothing(policy: ModelSection) -> None:
    watched = function("tests.slow_rewards:fails_on_bad", on_error="mask", weight=0, max_retries=0)
    scores = worker(policy, watched, function("tests.fakes:num_characters")).score(texts("bad"))
    assert scores.is_valid.tolist() == [True]
    assert scores.events["reward/fails_on_bad/failures"] == 1.0


def test_not_to_apply_is_no_failure(policy: ModelSection) -> None:
    scores = worker(policy, function("tests.fakes:nothing_to_say", on_error="mask")).score(texts("a"))
    assert scores.is_valid.tolist() == [True]


def test_retry_ends_in_the_failure(policy: ModelSection, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RewardError, match="'fails_on_bad' raised ValueError: bad"):
        worker(policy, function("tests.slow_rewards:fails_on_bad", on_error="retry")).score(texts("bad"))
    assert capfd.readouterr().err.count("of 3: reward 'fails_on_bad'") == 3


def test_a_hung_function_is_masked(policy: ModelSection) -> None:
    hung = function("tests.slow_rewards:sleeps_when_asked", timeout=1, on_error="mask", max_retries=0)
    source = worker(policy, hung, (LengthReward(type="length", target=2), ()))
    scores = source.score(texts("sleep"))
    assert scores.is_valid.tolist() == [False]
    assert scores.parts["length"].tolist() == [-1.0]  # six tokens are four away from two
    assert source.score(texts("a")).is_valid.tolist() == [True]
    source.close()


def test_a_slow_server_and_the_reward_model_work_at_the_same_time(
    policy: ModelSection, reward_models: list[ModelSection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server sleeps until the model has scored, and the model waits until the server has been asked."""
    asked, scored = threading.Event(), threading.Event()
    original = ModelSource._scores

    def scores(self: ModelSource, samples: Samples) -> np.ndarray:
        assert asked.wait(20), "the server is asked only after the model"
        found = original(self, samples)
        scored.set()
        return found

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.set()
        while not scored.is_set():
            await asyncio.sleep(0.01)
        return web.json_response({"rewards": [7.0]})

    monkeypatch.setattr(ModelSource, "_scores", scores)
    with running(answering(handle)) as url:
        server = http_section(url, timeout=20, on_error="raise"), ()
        model = ModelReward(type="model"), (reward_models[0],)
        found = worker(policy, model, server).score(texts("egg"))
    assert found.parts["served"].tolist() == [7.0]


def test_models_take_the_device_in_turn(
    policy: ModelSection, reward_models: list[ModelSection], monkeypatch: pytest.MonkeyPatch
) -> None:
    active: list[int] = []
    original = ModelSource._scores

    def scores(self: ModelSource, samples: Samples) -> np.ndarray:
        active.append(1)
        assert len(active) == 1
        found = original(self, samples)
        active.pop()
        return found

    monkeypatch.setattr(ModelSource, "_scores", scores)
    sources = [(ModelReward(type="model", name=f"rm{n}"), (model,)) for n, model in enumerate(reward_models)]
    assert list(worker(policy, *sources).score(texts("egg")).parts) == ["rm0", "rm1", "rm2"]


def test_what_judges_say_is_added(policy: ModelSection) -> None:
    judge = JudgeReward(type="judge", name="judge", weight=10, on_error="mask")
    said = Outcome(Values(np.float32([0.25, np.nan])), np.array([False, True]), num_retries=0)
    source = worker(policy, (judge, ()), function("tests.fakes:num_characters"))
    scores = source.score(texts("abc", "a"), {"judge": said})
    assert scores.total.tolist() == [2.5 + 3, 1.0]
    assert scores.is_valid.tolist() == [True, False]
    assert list(scores.parts) == ["judge", "num_characters"]


def test_chunks_join() -> None:
    parts = [
        Scores(
            np.float32([1.0] * n),
            {"a": np.float32([n] * n)},
            np.array([n == 1] * n),
            {"a": np.float32([n] * n)},
            {"reward/a/retries": float(n)},
        )
        for n in (1, 2)
    ]
    whole = Scores.concat(parts)
    assert whole.is_valid.tolist() == [True, False, False]
    assert whole.spreads["a"].tolist() == [1.0, 2.0, 2.0]
    assert whole.events == {"reward/a/retries": 3.0}
    chosen = whole.select([2, 0])
    assert chosen.is_valid.tolist() == [False, True]
    assert chosen.spreads["a"].tolist() == chosen.parts["a"].tolist() == [2.0, 1.0]
    assert chosen.events == whole.events
