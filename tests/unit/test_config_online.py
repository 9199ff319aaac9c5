"""What the online algorithms are by default, what one key changes, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import ValidationError

from rlhf_ray.config.checks import check_config
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.schema import RECIPES, OnlineSection, Recipe
from rlhf_ray.config.schema.algorithms import MIN_GENERATIONS
from rlhf_ray.errors import ConfigError

COMMON = {
    "dataset": {"path": "prompts.jsonl"},
    "rewards": [{"type": "function", "name": "f", "function": "tests.fakes:num_vowels"}],
    "num_steps": 1,
    "prompts_per_step": 4,
}
# Written out once more, from the papers: kl_coef, where, estimator, 1 - low, 1 + high, aggregation.
PUBLISHED = {
    "ppo": (0.05, "reward", "k1", 0.8, 1.2, "token"),
    "grpo": (0.04, "loss", "k3", 0.8, 1.2, "sequence"),
    "dr_grpo": (0.0, "loss", "k3", 0.8, 1.2, "constant"),
    "dapo": (0.0, "loss", "k3", 0.8, 1.28, "token"),
    "gspo": (0.0, "loss", "k3", 0.9997, 1.0004, "sequence"),
    "cispo": (0.0, "loss", "k3", 0.0, 5.0, "token"),
    "rloo": (0.05, "reward", "k1", 0.8, 1.2, "constant"),
    "reinforce_pp": (0.01, "reward", "k1", 0.8, 1.2, "token"),
    "reinforce_pp_baseline": (0.01, "loss", "k2", 0.8, 1.2, "token"),
    "remax": (0.05, "reward", "k1", 0.8, 1.2, "constant"),
    "raft": (0.0, "loss", "k3", 0.8, 1.2, "token"),
}
WHITENED = {"ppo", "reinforce_pp", "reinforce_pp_baseline"}
ALONE = {"ppo", "reinforce_pp", "remax"}
"""Those that need no second answer to a prompt."""
EVERY = pytest.mark.parametrize("algorithm", PUBLISHED)


def section(algorithm: str, **options: object) -> OnlineSection:
    critic = {"critic_init": "policy"} if algorithm == "ppo" else {}
    return OnlineSection.model_validate(
        {"algorithm": algorithm, "num_generations": 4, **COMMON, **critic, **options}
    )


def refused(algorithm: str, **options: object) -> str:
    with pytest.raises(ValidationError) as caught:
        section(algorithm, **options)
    (error,) = caught.value.errors()
    return str(error["msg"]).removeprefix("Value error, ")


@EVERY
def test_settings_are_the_published_ones(algorithm: str) -> None:
    recipe = section(algorithm).recipe
    found = (
        recipe.kl_coef,
        recipe.kl_placement,
        recipe.kl_estimator,
        pytest.approx(1 - recipe.cliprange),
        pytest.approx(1 + recipe.cliprange_high),
        recipe.loss_aggregation,
    )
    assert found == PUBLISHED[algorithm]
    assert recipe.whiten_advantages == (algorithm in WHITENED)
    assert recipe.dynamic_sampling == (algorithm == "dapo")
    assert recipe.overlong_buffer == (0.2 if algorithm == "dapo" else 0.0)
    assert section(algorithm).uses_critic == (algorithm == "ppo")
    assert PUBLISHED.keys() == RECIPES.keys() == MIN_GENERATIONS.keys()


@EVERY
def test_number_of_generations(algorithm: str) -> None:
    least = 1 if algorithm in ALONE else 2
    assert MIN_GENERATIONS[algorithm] == least  # type: ignore[index]
    assert section(algorithm, num_generations=least).num_generations == least
    if least == 2:
        assert refused(algorithm, num_generations=1) == (
            f"num_generations=1: {algorithm} compares the answers to a prompt and needs at least 2"
        )


KEYS: dict[str, object] = {
    "kl_coef": 0.123,
    "cliprange_high": 0.5,
    "loss_aggregation": "constant",
    "whiten_advantages": True,
    "overlong_buffer": 0.4,
    "dynamic_sampling": True,
}


@EVERY
@pytest.mark.parametrize("key", KEYS)
def test_one_key_changes_itself_alone(algorithm: str, key: str) -> None:
    if (algorithm, key) == ("remax", "dynamic_sampling"):
        return  # refused, see below
    own: Recipe = RECIPES[algorithm]  # type: ignore[index]
    assert section(algorithm, **{key: KEYS[key]}).recipe == replace(own, **{key: KEYS[key]})


@EVERY
def test_false_and_zero_are_values_too(algorithm: str) -> None:
    off = {"whiten_advantages": False, "dynamic_sampling": False, "overlong_buffer": 0.0, "kl_coef": 0.0}
    own: Recipe = RECIPES[algorithm]  # type: ignore[index]
    assert section(algorithm, **off).recipe == replace(own, **off)


@EVERY
def test_cliprange_alone_is_both_sides(algorithm: str) -> None:
    own: Recipe = RECIPES[algorithm]  # type: ignore[index]
    alone = section(algorithm, cliprange=0.07).recipe
    assert alone == replace(own, cliprange=0.07, cliprange_high=0.07)
    both = section(algorithm, cliprange=0.07, cliprange_high=0.09).recipe
    assert both == replace(own, cliprange=0.07, cliprange_high=0.09)


@EVERY
def test_the_estimator_moves_with_the_kl(algorithm: str) -> None:
    own: Recipe = RECIPES[algorithm]  # type: ignore[index]
    in_reward, in_loss = (section(algorithm, kl_placement=place).recipe for place in ("reward", "loss"))
    assert in_reward == replace(own, kl_placement="reward", kl_estimator="k1")
    usual = "k2" if algorithm == "reinforce_pp_baseline" else "k3"
    assert in_loss == replace(own, kl_placement="loss", kl_estimator=usual)
    other = section(algorithm, kl_placement="loss", kl_estimator="k2").recipe
    assert other.kl_estimator == "k2"


def test_the_reference_is_there_to_train_with_or_to_measure() -> None:
    assert section("dapo").uses_reference
    assert not section("dapo", track_kl=False).uses_reference
    assert section("grpo", track_kl=False).uses_reference
    assert not section("grpo", track_kl=False, kl_coef=0.0).uses_reference
    assert section("dapo", track_kl=False, kl_coef=0.1).uses_reference


# mistakes


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "reinforce_pp_baseline"])
def test_k1_in_the_loss(algorithm: str) -> None:
    assert refused(algorithm, kl_estimator="k1") == (
        "kl_estimator=k1: its gradient in the loss does not depend on the reference (it is zero in "
        "expectation); use k2 or k3, or kl_placement: reward"
    )
    assert section(algorithm, kl_estimator="k1", kl_placement="reward").recipe.kl_estimator == "k1"


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "remax", "reinforce_pp"])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_in_the_reward(algorithm: str, estimator: str) -> None:
    assert refused(algorithm, kl_estimator=estimator) == (
        f"kl_estimator={estimator}: in the reward only k1 is unbiased; use k1, or kl_placement: loss"
    )


@pytest.mark.parametrize("algorithm", sorted(RECIPES.keys() - {"ppo"}))
def test_settings_of_a_critic_that_is_not_there_do_not_stand_in_the_way(algorithm: str) -> None:
    """To compare algorithms is to change one line."""
    critic = {"critic_init": "reward", "critic_warmup_steps": 9, "critic_optimizer": {"learning_rate": 0.1}}
    assert not section(algorithm, **critic).uses_critic


def test_whitened_rewards_are_for_a_critic() -> None:
    assert refused("rloo", whiten_rewards=True).startswith(
        "whiten_rewards: what it adds grows with the length"
    )
    assert section("ppo", whiten_rewards=True, critic_init="policy").whiten_rewards


def test_raft_has_no_ratio_for_the_samplers_logprobs() -> None:
    assert refused("raft", recompute_old_logprobs=False).startswith(
        "recompute_old_logprobs=false: the loss of"
    )


@pytest.mark.parametrize("algorithm", ["dapo", "dr_grpo", "gspo", "cispo", "raft"])
def test_a_target_for_a_kl_without_a_coefficient(algorithm: str) -> None:
    said = "kl_target: kl_coef is 0, and would stay so; give kl_coef a value to start from"
    assert refused(algorithm, kl_target=1.0) == said
    assert section(algorithm, kl_target=1.0, kl_coef=0.1).kl_target == 1.0
    assert refused("grpo", kl_target=1.0, kl_coef=0.0) == said


@pytest.mark.parametrize("algorithm", sorted(RECIPES.keys() - {"raft"}))
def test_the_samplers_logprobs_without_a_correction(algorithm: str) -> None:
    assert refused(algorithm, recompute_old_logprobs=False, importance_correction="none").startswith(
        "recompute_old_logprobs=false: without the trainer's own log-probs the difference between sampler "
        "and trainer has to be bounded; set importance_correction, token_truncate for example"
    )
    assert not section(algorithm, recompute_old_logprobs=False).recompute_old_logprobs
    assert section(algorithm, importance_correction="none").importance_correction == "none"


def test_dynamic_sampling_for_remax() -> None:
    assert refused("remax", dynamic_sampling=True) == (
        "dynamic_sampling: remax compares each answer with the greedy one and learns from every prompt; "
        "leave it out"
    )


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce_pp"])
def test_dynamic_sampling_needs_answers_to_compare(algorithm: str) -> None:
    """The algorithm does not, so the message names what does."""
    assert refused(algorithm, dynamic_sampling=True, num_generations=1) == (
        "num_generations=1: dynamic_sampling compares the answers to a prompt and needs at least 2"
    )


def test_an_advantage_function_of_ones_own_may_do_with_one_answer() -> None:
    own = section("grpo", num_generations=1, advantage_function="tests.fakes:num_vowels")
    assert own.num_generations == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"max_lag": 1, "oversample": 1.5},
            "oversample=1.5: what is sampled beyond prompts_per_step is given up;",
        ),
        ({"stragglers": "drop"}, "stragglers=drop: every prompt that is sampled is needed; set max_lag,"),
        (
            {"stragglers": "drop", "oversample": 1.01},
            "stragglers=drop: every prompt that is sampled is needed",
        ),
    ],
)
def test_what_is_given_up_must_have_been_sampled_to_spare(options: dict[str, object], said: str) -> None:
    assert refused("grpo", **options).startswith(said)
    assert section("grpo", stragglers="drop", oversample=1.5).spare_prompts == 2
    assert section("grpo", stragglers="drop", max_lag=1).spare_prompts == 0


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (
            {"engine": {"backend": "transformers"}},
            "by the transformers backend whole batches are answered at once",
        ),
        (
            {"environment": {"class_path": "rlhf_ray.environments.guessing:NumberGuessing"}},
            "with an environment",
        ),
    ],
)
def test_stragglers_are_told_by_engines_that_answer_prompt_by_prompt(
    tree: dict[str, object], said: str
) -> None:
    online = {**COMMON, "algorithm": "rloo", "num_generations": 2, "max_lag": 1, "stragglers": "drop"}
    if "environment" in tree:
        online["environment"] = tree["environment"]
    engine = {key: value for key, value in tree.items() if key == "engine"}
    config = load_config({"output_dir": "r", "online": online, **engine})
    (mistake,) = [mistake for mistake in check_config(config) if "stragglers" in mistake]
    assert mistake.startswith(f"online.stragglers=drop: {said}")


@pytest.mark.parametrize("value", [-1, 1.5, "one"])
def test_a_lag_is_a_number_of_versions(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^online\.max_lag="):
        load_config({"output_dir": "r", "online": {**COMMON, "critic_init": "policy", "max_lag": value}})


def test_every_mistake_of_a_section_at_once() -> None:
    assert refused("grpo", num_generations=1, kl_estimator="k1", whiten_rewards=True).count("\n") == 2


@pytest.mark.parametrize("key", ["top_p", "top_k", "min_p"])
def test_a_cut_distribution_is_refused_with_the_reason(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"output_dir": "r", "online": {**COMMON, "critic_init": "policy", key: 0.9}})
    assert caught.value.mistakes == (
        f"online.{key}=0.9: unknown key; it cuts the distribution that is sampled from, and the ratio of "
        "the loss would be taken to another one; use temperature",
    )


@pytest.mark.parametrize("key", ["advantage_function", "policy_loss_function"])
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_module:f", "cannot import no_such_module (No module named 'no_such_module')"),
        ("tests.fakes:no_such_function", "tests.fakes has no function no_such_function"),
        ("tests.fakes.num_vowels", "write it as module:name"),
    ],
)
def test_functions_of_ones_own_that_are_not_there(key: str, path: str, reason: str) -> None:
    config = load_config(
        {"output_dir": "r", "online": {**COMMON, "critic_init": "policy", key: path}, "model": {"path": "m"}}
    )
    assert f"online.{key}={path}: {reason}" in check_config(config)
