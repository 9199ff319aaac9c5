"""The example of docs/environments.md works as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from rlhf_ray.config.schema import EnvironmentSection
from rlhf_ray.engines.generation import Sample
from rlhf_ray.environments.interface import import_environment, option_mistake
from rlhf_ray.types import Prompts, SamplingSpec
from tests.environments import ScriptedEngine
from tests.local_roles import online_section, player_of
from tests.samples import prompts_of
from tests.tiny import tiny_tokenizer

TEXT = (Path(__file__).parents[2] / "docs" / "environments.md").read_text()


@pytest.fixture
def section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EnvironmentSection:
    """The example's, with its class importable."""
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "my_environment.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_environment", raising=False)
    (written,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    return EnvironmentSection.model_validate(yaml.safe_load(written)["online"]["environment"])


def test_the_calculator_is_used(section: EnvironmentSection) -> None:
    """12 * 7 by the tool, then the answer: the second turn earns 1, the first costs 0.1."""
    tokenizer = tiny_tokenizer()

    def sample(text: str) -> Sample:
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]
        return Sample(ids, [-1.0] * len(ids), [5] * len(ids), finished=True)

    assert option_mistake(import_environment(section.class_path), section.options) is None
    prompts = prompts_of("What is 12 * 7 + 5?")
    prompts = Prompts(prompts.ids, prompts.messages, prompts.token_ids, ({"result": 89},))
    engine = ScriptedEngine([sample("<calc>12 * 7</calc>")], [sample("84 + 5 is 89")])
    environment = section.model_dump()
    player = player_of(engine, online_section(environment=environment, max_completion_length=64))
    rollouts = player.generate(prompts, SamplingSpec(64), seed=0)
    said = rollouts.responses[0][~rollouts.sampled]
    assert tokenizer.decode(said) == "\n<|im_start|>user\n= 84<|im_end|>\n<|im_start|>assistant\n"
    rewards = rollouts.turn_rewards[0]
    assert rewards[rewards != 0].tolist() == pytest.approx([-0.1, 1.0])


def test_the_keys_are_those_of_the_section(section: EnvironmentSection) -> None:
    assert (section.max_turns, section.max_episode_length, section.timeout) == (3, 256, 10)
