"""A language model as judge, against probabilities that transformers gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.config.schema import EngineSection, JudgeReward, ModelSection
from rlhf_ray.errors import RewardError
from rlhf_ray.rewards.judge import fill_template, transcript
from rlhf_ray.types import Rollouts
from rlhf_ray.workers.rewards import JudgeWorker
from tests.samples import rollouts_of
from tests.tiny import tiny_model_folder, tiny_tokenizer

ENGINE = EngineSection(backend="transformers", dtype="float32")
TEMPLATE = "Q: {prompt} A: {completion} Good?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("judge"), seed=5)))


def judge(**options: object) -> JudgeReward:
    return JudgeReward.model_validate({"type": "judge", "name": "judge", "template": TEMPLATE, **options})


def answers(*texts: str) -> Rollouts:
    tokenizer = tiny_tokenizer()
    return rollouts_of([[1, 30]] * len(texts), [[*tokenizer(text)["input_ids"], 2] for text in texts])


@torch.no_grad()
def expected_value(model: ModelSection, text: str, options: dict[str, float]) -> float:
    """Written out: ChatML around the question, one forward a token of each reply."""
    tokenizer = tiny_tokenizer()
    network = AutoModelForCausalLM.from_pretrained(model.path).eval()
    question = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    weights = []
    for reply in options:
        ids = tokenizer(question)["input_ids"]
        logprob = 0.0
        for token in tokenizer(reply)["input_ids"]:
            logprob += float(network(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
            ids = [*ids, token]
        weights.append(np.exp(logprob))
    return float(np.dot(weights, list(options.values())) / np.sum(weights))


def test_the_reward_is_the_expected_value_of_the_reply(model: ModelSection) -> None:
    """Replies of several tokens, of different lengths, and values that are no probabilities."""
    for options in ({"Yes": 1.0, "No": 0.0}, {"good": 5.0, "so so": 2.0, "bad": -1.0}):
        worker = JudgeWorker([judge(options=options)], model, model, ENGINE, threads=1)
        outcome = worker.score(answers("six minutes", "no {prompt} idea"))["judge"]
        expected = [
            expected_value(model, "Q: question 0 A: six minutes Good?", options),
            expected_value(model, "Q: question 1 A: no {prompt} idea Good?", options),
        ]
        np.testing.assert_allclose(outcome.values.rewards, expected, rtol=1e-4)
        assert expected[0] != pytest.approx(expected[1], abs=1e-4)


def test_several_judges_share_the_engine(model: ModelSection) -> None:
    other = judge(name="other", template="{completion}?")
    found = JudgeWorker([judge(), other], model, model, ENGINE, threads=1).score(answers("egg"))
    options = {"Yes": 1.0, "No": 0.0}
    assert found["judge"].values.rewards[0] == pytest.approx(
        expected_value(model, "Q: question 0 A: egg Good?", options), rel=1e-4
    )
    assert found["other"].values.rewards[0] == pytest.approx(expected_value(model, "egg?", options), rel=1e-4)


def test_a_question_that_does_not_fit_fails_alone(model: ModelSection) -> None:
    long = answers("egg", "egg " * 60)
    with pytest.raises(RewardError, match=r"reward 'judge': prompt 1: .* tokens, and \d+ fit; raise max_len"):
        JudgeWorker([judge(max_length=90)], model, model, ENGINE, threads=1).score(long)
    masking = judge(max_length=90, on_error="mask")
    outcome = JudgeWorker([masking], model, model, ENGINE, threads=1).score(long)["judge"]
    assert outcome.failed.tolist() == [False, True]
    assert np.isnan(outcome.values.rewards).tolist() == [False, True]
    alone = JudgeWorker([judge()], model, model, ENGINE, threads=1).score(answers("egg"))["judge"]
    assert outcome.values.rewards[0] == pytest.approx(alone.values.rewards[0], rel=1e-5)


def test_fields_are_filled_once() -> None:
    prompt = ({"role": "user", "content": "what is {completion}?"},)
    filled = fill_template("{prompt} {x} {completion}", prompt, "{prompt}")
    assert filled == "what is {completion}? {x} {prompt}"


def test_a_conversation_says_who_speaks() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    assert transcript(turns) == "User: hi\n\nAssistant: yes?"
    assert transcript(turns[:1]) == "hi"


def test_the_default_template_is_inline() -> None:
    assert JudgeReward(type="judge", name="j").is_inline
    assert not judge(template=str(Path("judge.txt"))).is_inline
