"""What the driver settles before the reward actor starts: models, templates, tokens. No Ray is started."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import pytest

from launch.artefacts import Artefacts
from launch.stages.context import StageContext
from launch.stages.rewards import RewardModels, find_rewards
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.schema import JudgeReward, ModelSection
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.loading import load_scalar_model, load_tokenizer, save_model_folder
from rlhf_ray.reporting.progress import QuietProgress
from rlhf_ray.reporting.run_folder import RunFolder
from tests.tiny import tiny_model_folder

GOLD = {"type": "function", "name": "gold", "function": "rlhf_ray.rewards.gold:friendliness"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    policy = ModelSection(path=str(tiny_model_folder(tmp_path / "lm")))
    for name in ("rm", "other"):
        network, tokenizer = load_scalar_model(policy, seed=1), load_tokenizer(policy)
        if name == "other":
            tokenizer.chat_template += "\n"
        save_model_folder(network, dict(network.named_parameters()), tokenizer, tmp_path / name)
    return tmp_path


def context(
    *rewards: dict[str, object], trained: ModelSection | None = None, **online: object
) -> StageContext:
    section = {
        "num_steps": 1,
        "critic_init": "policy",
        "dataset": {"path": "prompts.jsonl"},
        "rewards": [*rewards, GOLD],
        **online,
    }
    config = load_config({"output_dir": "runs/x", "model": {"path": "lm"}, "online": section})
    artefacts = Artefacts(policy=config.model, reward_model=trained)
    return StageContext(config, "online", 1, artefacts, RunFolder(Path("runs/x")), QuietProgress(), Event())


def found(here: StageContext) -> RewardModels:
    assert here.config.online is not None
    policy = here.model("model", None)
    return find_rewards(here, here.config.online, policy)


def test_each_source_has_its_models(folder: Path) -> None:
    ensemble = {"type": "ensemble", "name": "several", "paths": ["rm", "other"]}
    here = context({"type": "model", "path": "rm"}, ensemble, trained=ModelSection(path="never"))
    rewards = found(here)
    assert [[Path(m.path).name for m in models] for _, models in rewards.sources] == [
        ["rm"],
        ["rm", "other"],
        [],
    ]
    assert all(Path(model.path).is_absolute() for model in rewards.models)
    assert here.parents == {
        "model": "lm",
        "reward:proxy": "rm",
        "reward:several[0]": "rm",
        "reward:several[1]": "other",
    }


def test_without_a_path_it_is_what_the_reward_stage_made(folder: Path) -> None:
    rewards = found(context({"type": "model"}, trained=ModelSection(path="rm")))
    assert [Path(model.path).name for model in rewards.models] == ["rm"]
    with pytest.raises(ConfigError, match="'proxy' names no path, and no reward stage came before"):
        found(context({"type": "model"}))


def test_a_judge_is_the_model_of_the_stage_and_its_template_is_read_here(folder: Path) -> None:
    (folder / "judge.txt").write_text("{completion}?")
    rewards = found(context({"type": "judge", "name": "judge", "template": "judge.txt"}))
    assert rewards.judge == ModelSection(path=str((folder / "lm").resolve()))
    (judge,) = rewards.judges
    assert isinstance(judge, JudgeReward)
    assert judge.template == "{completion}?"


def test_tokens_come_from_this_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = {"type": "http", "name": "server", "url": "http://127.0.0.1:1/", "token_env": "MY_TOKEN"}
    monkeypatch.delenv("MY_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="token_env=MY_TOKEN: the environment variable is not set"):
        found(context(server))
    monkeypatch.setenv("MY_TOKEN", "hush")
    rewards = found(context(server))
    assert rewards.tokens["server"].get_secret_value() == "hush"
    assert "hush" not in repr(rewards)


def test_a_critic_cannot_start_from_a_reward_model_with_other_words(folder: Path) -> None:
    policy = ModelSection(path="lm")
    alike, other = (found(context({"type": "model", "path": name})) for name in ("rm", "other"))
    assert Path(alike.critic_start(policy).path).name == "rm"
    with pytest.raises(ConfigError, match="critic_init=reward: the reward model has another tokenizer"):
        other.critic_start(policy)
