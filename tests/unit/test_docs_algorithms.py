"""The example of docs/algorithms.md works as it stands, and its table says what the code does."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from rlhf_ray.algorithms import ALGORITHMS, AdvantageInputs
from rlhf_ray.config.schema import RECIPES, ModelSection
from rlhf_ray.workers.algorithm import algorithm_of
from tests.local_roles import online_section, weights_of
from tests.tiny import tiny_model_folder
from tests.unit.test_loops_online import online_loop, policy_of, train

TEXT = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()


@pytest.fixture
def my_algorithms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "my_algorithms.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_algorithms", raising=False)


def test_table_has_every_algorithm_with_its_settings() -> None:
    rows = {row.split("`")[1]: row for row in re.findall(r"^\| `\w+` .*$", TEXT, re.MULTILINE)}
    rows.pop("algorithm")
    assert rows.keys() == RECIPES.keys() == ALGORITHMS.keys()
    for name, recipe in RECIPES.items():
        said = f"in the {recipe.kl_placement}, {recipe.kl_estimator}, {recipe.kl_coef}"
        assert (said if recipe.kl_coef else "| none |") in rows[name]
        assert ("whitened" in rows[name]) == recipe.whiten_advantages


def test_own_advantage_function(my_algorithms: None) -> None:
    section = online_section(
        algorithm="grpo", advantage_function="my_algorithms:rank_advantages", num_generations=3
    )
    inputs = AdvantageInputs(
        rewards=torch.tensor([1.0, 1.0, 0.5, 3.0, 7.0]),
        values=torch.zeros(5),
        offsets=torch.tensor([0, 2, 3, 4, 5]),
        group_ids=torch.tensor([8, 8, 8, 9]),
        gamma=1.0,
        lam=1.0,
    )
    found = algorithm_of(section).advantages(inputs).advantages
    # Rewards 2, 0.5 and 3 in one group; 7 alone in the other.
    assert found.tolist() == pytest.approx([0, 0, -2 / 3, 2 / 3, 0])


def test_own_advantage_function_trains(my_algorithms: None, tmp_path: Path) -> None:
    tiny_model = ModelSection(path=str(tiny_model_folder(tmp_path / "model")))
    section = online_section(
        algorithm="grpo", advantage_function="my_algorithms:rank_advantages", num_steps=2
    )
    loop = online_loop(tiny_model, tmp_path, section)
    before = weights_of(policy_of(loop).worker)
    train(loop)
    after = weights_of(policy_of(loop).worker)
    assert any((before[name] != after[name]).any() for name in before)
