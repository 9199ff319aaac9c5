"""The workers under the algorithms after PPO: batches by hand, and updates against plain torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from rlhf_ray.config.schema import ModelSection, OnlineSection
from rlhf_ray.types import Metrics, Ragged, RLBatch, Rollouts, Scores, StepInfo
from rlhf_ray.workers.experience import ExperienceWorker
from rlhf_ray.workers.policy import PolicyWorker
from tests.local_roles import online_section, weights_of
from tests.ranks import EXACT, worker_spec
from tests.samples import random_rollouts, rollouts_of
from tests.tiny import tiny_model_folder

INFO = StepInfo(step=0, version=0, kl_coef=0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


def scores_of(*rewards: float) -> Scores:
    return Scores(np.array(rewards, np.float32), {})


def answers(lengths: list[int], prompt_ids: list[int], finished: list[bool] | None = None) -> Rollouts:
    """Of given lengths; the sampler's log-probs are -1 everywhere."""
    return rollouts_of([[1, 30]] * len(lengths), [[40] * n for n in lengths], finished, prompt_ids)


def column(rollouts: Rollouts, values: list[float]) -> Ragged:
    return rollouts.responses.with_values(np.array(values, np.float32))


def prepared(
    model: ModelSection,
    folder: Path,
    section: OnlineSection,
    old: Ragged | None,
    *columns: Rollouts | Scores | Ragged,
    num_chunks: int = 1,
) -> tuple[RLBatch, Metrics]:
    return ExperienceWorker(section, model, folder).prepare(INFO, num_chunks, old, None, *columns)


# remax


def test_greedy_answers_are_found_by_prompt(model: ModelSection, tmp_path: Path) -> None:
    """Two chunks of samples, two of greedy answers to the same prompts in another order."""
    section = online_section(algorithm="remax", kl_coef=0.0, num_generations=2)
    first, second = answers([1, 2], [7, 3]), answers([1, 1], [5, 7])
    greedy_first, greedy_second = answers([3], [5]), answers([1, 1], [3, 7])
    ref = [column(chunk, [-1.0] * len(chunk.responses.values)) for chunk in (first, second)]
    batch, _ = prepared(
        model,
        tmp_path,
        section,
        Ragged.concat(ref),
        *(first, second, greedy_first, greedy_second),
        *(scores_of(1, 2), scores_of(3, 4), scores_of(50), scores_of(10, 20)),
        *ref,
        num_chunks=2,
    )
    # Greedy: prompt 5 got 50, prompt 3 got 10, prompt 7 got 20.
    assert batch.advantages.values.tolist() == [1 - 20, 2 - 10, 2 - 10, 3 - 50, 4 - 20]
    assert batch.prompt_ids.tolist() == [7, 3, 5, 7], "greedy answers are not trained on"


def test_the_greedy_answer_is_judged_like_the_samples(model: ModelSection, tmp_path: Path) -> None:
    """Clipped to 2, less 1 for each answer without EOS, less 1/2 for one token into a buffer of two."""
    section = online_section(
        algorithm="remax",
        kl_coef=0.0,
        reward_clip=2.0,
        missing_eos_penalty=1.0,
        overlong_buffer=0.25,
        max_completion_length=8,
    )
    samples, greedy = answers([1, 7], [0, 1], [True, False]), answers([7, 1], [0, 1], [False, True])
    old = column(samples, [-1.0] * 8)
    columns = (samples, greedy, scores_of(9, 9), scores_of(9, 1), old)
    batch, _ = prepared(model, tmp_path, section, old, *columns)
    # Samples: 2 and 2 - 1 - 0.5; greedy: 2 - 1 - 0.5 and 1.
    assert batch.advantages.values.tolist() == pytest.approx([2 - 0.5, *[0.5 - 1] * 7])


def test_the_greedy_answer_is_scaled_like_the_samples(model: ModelSection, tmp_path: Path) -> None:
    """By the deviation of the samples' rewards, which the greedy one does not add to."""
    section = online_section(algorithm="remax", kl_coef=0.0, normalize_rewards=True)
    samples, greedy = answers([1, 1, 1], [0, 0, 1]), answers([1, 1], [1, 0])
    old = column(samples, [-1.0] * 3)
    worker = ExperienceWorker(section, model, tmp_path)
    columns = (samples, greedy, scores_of(2, 4, 6), scores_of(100, 1), old)
    batch, _ = worker.prepare(INFO, 1, old, None, *columns)
    # Deviation of 2, 4 and 6: 2.
    assert batch.advantages.values.tolist() == pytest.approx([1 - 0.5, 2 - 0.5, 3 - 50])
    assert worker.state_dict()["count"] == 3


# prepare


def test_reinforce_pp_by_hand(model: ModelSection, tmp_path: Path) -> None:
    """KL taken off token by token, summed to go, whitened over the batch's tokens."""
    samples = answers([2, 1], [4, 9])
    old, ref = column(samples, [-1.0, -2.0, -3.0]), column(samples, [-1.5, -1.0, -3.0])
    section = online_section(algorithm="reinforce_pp", num_generations=1)
    batch, _ = prepared(model, tmp_path, section, old, samples, scores_of(3, 0.5), ref)
    raw = np.array([3 - 0.1 * (0.5 - 1), 3 + 0.1, 0.5])
    expected = (raw - raw.mean()) / raw.std(ddof=1)
    np.testing.assert_allclose(batch.advantages.values, expected, rtol=1e-5)


def test_groups_reach_over_chunks(model: ModelSection, tmp_path: Path) -> None:
    """Group 4 has its three answers in two chunks, with those of 9 between them."""
    first, second = answers([1, 2], [4, 9]), answers([1, 1, 1], [9, 4, 4])
    old = [column(chunk, [-1.0] * len(chunk.responses.values)) for chunk in (first, second)]
    section = online_section(algorithm="rloo", num_generations=3, kl_coef=0.0)
    columns = (first, second, scores_of(6, 1), scores_of(3, 0, 3), *old)
    batch, metrics = prepared(model, tmp_path, section, Ragged.concat(old), *columns, num_chunks=2)
    assert batch.advantages.values.tolist() == [6 - 1.5, -2, -2, 2, 0 - 4.5, 3 - 3]
    assert metrics["reward/frac_zero_std"] == 0.0


def test_overlong_answers_of_dapo(model: ModelSection, tmp_path: Path) -> None:
    """A fifth of 10 tokens: at 8 nothing, at 9 a half, at 10 one."""
    samples = answers([8, 9, 10, 1], [0, 0, 0, 0])
    old = column(samples, [-1.0] * 28)
    section = online_section(algorithm="dapo", num_generations=4, max_completion_length=10)
    batch, metrics = prepared(model, tmp_path, section, old, samples, scores_of(1, 1, 1, 0), old)
    shaped = np.array([1, 0.5, 0, 0])
    expected = (shaped - shaped.mean()) / (shaped.std(ddof=1) + 1e-4)
    found = batch.advantages.values[batch.advantages.offsets[:-1]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert metrics["reward/mean"] == 0.75, "what the rewards said"
    assert metrics["reward/score"] == pytest.approx(0.375)


def test_raft_leaves_the_others_out(model: ModelSection, tmp_path: Path) -> None:
    samples = answers([2, 1, 1], [4, 4, 9])
    old = column(samples, [-1.0] * 4)
    section = online_section(algorithm="raft")
    batch, _ = prepared(model, tmp_path, section, old, samples, scores_of(1, 2, 0), old)
    assert batch.is_trained.values.tolist() == [False, False, True, True]
    assert batch.advantages.values.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ("token_truncate", [2.0, 0.5, 1.0]),
        ("token_mask", [0.0, 0.5, 1.0]),
        ("sequence_truncate", [2.0, 2.0, 1.0]),
        ("sequence_mask", [2.0, 2.0, 1.0]),
        ("geometric_mask", [1.0, 1.0, 1.0]),
        ("none", [1.0, 1.0, 1.0]),
    ],
)
def test_importance_weights_of_a_batch(
    model: ModelSection, tmp_path: Path, correction: str, expected: list[float]
) -> None:
    """Ratios 4 and 1/2 in the first row, a product of 2; 1 in the second."""
    samples = answers([2, 1], [4, 4])
    old = column(samples, [-1 + np.log(4), -1 + np.log(0.5), -1.0])
    section = online_section(algorithm="grpo", importance_correction=correction, importance_cap=2.00001)
    columns = (samples, scores_of(1, 2), old)
    batch, metrics = prepared(model, tmp_path, section, old, *columns)
    np.testing.assert_allclose(batch.importance_weights.values, expected, rtol=1e-4)
    if correction != "none":
        assert metrics["mismatch/weight_mean"] == pytest.approx(np.mean(expected), rel=1e-4)
        assert metrics["mismatch/fraction_masked"] == pytest.approx(np.mean(np.array(expected) == 0))
    unknown, metrics = prepared(model, tmp_path, section, None, *columns)
    assert unknown.importance_weights.values.tolist() == [1, 1, 1], "the loss's own ratio corrects"
    assert unknown.old_logprobs.values.tolist() == [-1, -1, -1], "the sampler's"
    assert not [name for name in metrics if name.startswith("mismatch/")]


# dynamic sampling


def test_selection_over_several_chunks(model: ModelSection, tmp_path: Path) -> None:
    """Prompts in the order 8, 2, 5, 1; 8 and 5 say nothing; 2 and 5 have answers in two chunks."""
    experience = ExperienceWorker(online_section(algorithm="dapo"), model, tmp_path)
    chunks = (answers([1, 2, 3], [8, 8, 2]), answers([4, 5], [5, 2]), answers([6, 7, 8], [1, 5, 1]))
    scores = (scores_of(1, 1, 0), scores_of(3, 1), scores_of(0, 3, 1))
    informative = [experience.num_informative(*pair) for pair in zip(chunks, scores, strict=True)]
    assert informative == [0, 0, 1], "a chunk is judged by what is in it"

    def select(num_prompts: int) -> tuple[list[int], list[int], list[float]]:
        rollouts, found = experience.select(num_prompts, *chunks, *scores)
        return rollouts.prompt_ids.tolist(), rollouts.responses.lengths.tolist(), found.total.tolist()

    assert select(1) == ([2, 2], [3, 5], [0, 1])
    assert select(2) == ([2, 2, 1, 1], [3, 5, 6, 8], [0, 1, 0, 1])
    assert select(3) == ([2, 2, 1, 1, 8, 8], [3, 5, 6, 8, 1, 2], [0, 1, 0, 1, 1, 1]), "then the others"
    assert select(9)[0] == [2, 2, 1, 1, 8, 8, 5, 5]


# updates

LENGTHS = [(4, 9), (12, 3), (2, 14), (7, 1), (5, 6), (9, 4)]
ROLLOUTS = random_rollouts(LENGTHS)
NUM_TOKENS = len(ROLLOUTS.responses.values)
CAP = 1.2


def plain_logprobs(network: torch.nn.Module) -> torch.Tensor:
    """[R] of the sampled tokens."""
    found = []
    for prompt, response in zip(ROLLOUTS.prompts, ROLLOUTS.responses, strict=True):
        ids = torch.tensor([*prompt.tolist(), *response.tolist()])
        rows = network(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(rows.gather(-1, ids[len(prompt) :, None])[:, 0])
    return torch.cat(found)


def batch_of(old: NDArray[np.float32], advantages: NDArray[np.float32]) -> RLBatch:
    def each(values: NDArray[np.floating]) -> Ragged:
        return ROLLOUTS.responses.with_values(values.astype(np.float32))

    zeros, ones = each(np.zeros(NUM_TOKENS)), each(np.ones(NUM_TOKENS))
    return RLBatch(
        prompt_ids=ROLLOUTS.prompt_ids,
        prompts=ROLLOUTS.prompts,
        responses=ROLLOUTS.responses,
        old_logprobs=each(old),
        ref_logprobs=each(old - 0.3),
        values=zeros,
        advantages=each(advantages),
        returns=zeros,
        importance_weights=ones,
        is_trained=ROLLOUTS.responses.with_values(np.arange(NUM_TOKENS) % 5 != 0),
    )


def rows_of(flat: torch.Tensor) -> list[torch.Tensor]:
    return list(flat.split([response for _, response in LENGTHS]))


def slow_loss(algorithm: str, correction: str, logprobs: torch.Tensor, batch: RLBatch) -> torch.Tensor:
    """GRPO's or GSPO's loss, where the old log-probs are the sampler's; row by row."""
    kl_coef = 0.04 if algorithm == "grpo" else 0.0
    low, high = (0.8, 1.2) if algorithm == "grpo" else (1 - 3e-4, 1 + 4e-4)
    columns = [
        rows_of(torch.tensor(ragged.values))
        for ragged in (batch.old_logprobs, batch.ref_logprobs, batch.advantages, batch.is_trained)
    ]
    means = []
    for logprob, *others, is_trained in zip(rows_of(logprobs), *columns, strict=True):
        new = logprob[is_trained]
        if len(new) == 0:
            continue
        old, ref, a = (other[is_trained] for other in others)
        log_ratio = new - old
        ratio = (log_ratio if algorithm == "grpo" else log_ratio.mean().expand(len(new))).exp()
        surrogate = torch.minimum(ratio * a, ratio.clamp(low, high) * a)
        level = {"token": log_ratio, "sequence": log_ratio.sum(), "geometric": log_ratio.mean()}
        of_level = level[correction.split("_")[0]].detach().exp()
        if correction.endswith("truncate"):
            weight = torch.minimum(torch.ones_like(of_level), CAP / of_level)
        else:
            weight = ((of_level <= CAP) & (of_level >= 1 / CAP)).float()
        kl = torch.exp(ref - new) - 1 + new - ref
        means.append((-weight * surrogate + kl_coef * kl).mean())
    return torch.stack(means).mean()


@pytest.mark.parametrize(
    ("algorithm", "correction"),
    [
        ("grpo", "token_truncate"),
        ("grpo", "token_mask"),
        ("grpo", "sequence_truncate"),
        ("grpo", "geometric_mask"),
        ("gspo", "sequence_mask"),
    ],
)
def test_update_with_the_samplers_logprobs(model: ModelSection, algorithm: str, correction: str) -> None:
    """`recompute_old_logprobs: false`: the ratio is that of trainer and sampler, and what is left of the
    correction multiplies its surrogate. Loss, gradient norm and weights after a step of Adam."""
    section = online_section(
        algorithm=algorithm,
        recompute_old_logprobs=False,
        importance_correction=correction,
        importance_cap=CAP,
        prompts_per_step=3,
        optimizer={"learning_rate": 1e-3, "max_grad_norm": 1e6},
    )
    training = EXACT.model_copy(update={"tokens_per_micro_batch": 50})
    worker = PolicyWorker(model, worker_spec(training, section.optimizer, seed=0), section)
    network = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    generator = np.random.default_rng(0)
    with torch.no_grad():
        now = plain_logprobs(network).numpy()
    noise, advantages = generator.standard_normal((2, NUM_TOKENS)).astype(np.float32)
    batch = batch_of(now + 0.25 * noise, advantages)

    loss = slow_loss(algorithm, correction, plain_logprobs(network), batch)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in network.parameters()]).norm()
    torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0).step()

    metrics = worker.train_rl(batch, step=0, kl_coef=section.recipe.kl_coef)
    assert metrics["policy/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["policy/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    for name, weight in weights_of(worker).items():
        expected = network.get_parameter(name).detach().numpy()
        assert np.linalg.norm(weight - expected) < 1e-5 * np.linalg.norm(expected), name


@pytest.mark.parametrize("recompute", [True, False])
def test_the_batchs_weights_count_where_the_old_logprobs_are_the_trainers(
    model: ModelSection, recompute: bool
) -> None:
    """All weights 0: nothing moves; where the log-probs are the sampler's, that column is not read."""
    section = online_section(
        algorithm="dapo", prompts_per_step=3, num_ppo_epochs=2, recompute_old_logprobs=recompute
    )
    worker = PolicyWorker(model, worker_spec(EXACT, section.optimizer, seed=0), section)
    old = worker.logprobs(ROLLOUTS)
    batch = batch_of(old.values, np.ones(NUM_TOKENS, np.float32))
    batch = replace(batch, importance_weights=old.with_values(np.zeros(NUM_TOKENS, np.float32)))
    metrics = worker.train_rl(batch, step=0, kl_coef=0.0)
    assert (metrics["policy/grad_norm"] == 0) == recompute
