"""The study of human pairs: both methods are trained on and judged by the same pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.preference_hh import (
    ALGORITHMS,
    CONFIGS,
    REWARD_MODEL,
    Curve,
    check_same_pairs,
    length_rule,
    mean_curve,
    overrides_of,
    plot,
    stage_of,
)
from launch.artefacts import Artefacts
from launch.stages.context import StageContext
from launch.stages.preference import answers_of
from launch.stages.reward import pairs_of
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.reporting.progress import QuietProgress
from rlhf_ray.reporting.run_folder import RunFolder
from rlhf_ray.types import PairBatch, ReferencedPairs
from tests.tiny import tiny_model_folder

CURVE = Curve(0, "dpo", 1.0, 200, 0.44, [160, 320, 352], [0.5, 0.6, 0.7])


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Dialogues of which several began alike, and some are too long to be used."""
    rows = []
    for number in range(120):
        opening = f"\n\nHuman: Question {number // 2}?\n\nAssistant: Why?\n\nHuman: Tell me.\n\nAssistant:"
        tail = " very" * (300 if number % 10 == 3 else number % 5)
        rows.append({"chosen": f"{opening} Gladly{tail} so.", "rejected": f"{opening} No."})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(name: str, pairs: Path, *overrides: str) -> RunConfig:
    own = overrides_of(name, pairs, 10, overrides)
    return load_config(CONFIGS[stage_of(name)], [f"output_dir={pairs.parent / 'run'}", "seed=1", *own])


def split_of(name: str, pairs: Path, model: Path) -> tuple[PairBatch, PairBatch]:
    sizes = ("reward.held_out=20", "preference.held_out=20")
    config = config_of(name, pairs, f"model.path={model}", *sizes)
    folder = RunFolder(config.output_dir)
    stage = stage_of(name)
    context = StageContext(config, stage, 1, Artefacts.at_start(config), folder, QuietProgress(), Event())
    formatter = context.formatter(config.model)
    if stage == "reward":
        assert config.reward is not None
        return pairs_of(context, config.reward, formatter)
    assert config.preference is not None
    found = answers_of(context, config.preference, formatter)
    assert isinstance(found.train, ReferencedPairs) and isinstance(found.held_out, ReferencedPairs)
    return found.train, found.held_out


def tokens(batch: PairBatch) -> list[NDArray[np.int32]]:
    return [batch.chosen.values, batch.rejected.values, batch.prompt_lengths]


def test_both_stages_split_alike_for_a_seed(pairs: Path, tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "tiny")
    reward, preference = (split_of(name, pairs, model) for name in (REWARD_MODEL, "dpo"))
    for ours, theirs in zip(reward, preference, strict=True):
        for left, right in zip(tokens(ours), tokens(theirs), strict=True):
            np.testing.assert_array_equal(left, right)
    train, held_out = (len(side) for side in reward)
    assert train + held_out == 120 - 12, "a tenth of the pairs is too long"
    assert 15 <= held_out <= 20


def test_what_the_two_have_in_common_and_what_they_have_not(pairs: Path) -> None:
    rate = ("preference.optimizer.learning_rate=1.5e-5", "reward.max_steps=7", "training.zero_stage=1")
    dpo, model = config_of("dpo", pairs, *rate), config_of(REWARD_MODEL, pairs, *rate)
    assert dpo.preference is not None and model.reward is not None
    assert dpo.stages == ("preference",) and model.stages == ("reward",)
    assert (dpo.preference.optimizer.learning_rate, dpo.preference.max_steps) == (1.5e-5, None)
    assert model.reward.max_steps == 7
    assert dpo.training.zero_stage == model.training.zero_stage == 1
    assert dpo.model == model.model, "the same tokens, and so the same pairs that fit"
    for key in ("dataset", "held_out", "split_by", "max_length", "num_epochs", "batch_size", "eval_every"):
        assert getattr(dpo.preference, key) == getattr(model.reward, key), key


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_configuration(name: str, pairs: Path) -> None:
    section = config_of(name, pairs).preference
    assert section is not None and section.algorithm == name


def test_the_mean_is_over_what_all_seeds_have() -> None:
    other = replace(CURVE, seed=1, pairs=[160, 320, 336], accuracy=[0.6, 0.8, 0.9])
    shared, mean = mean_curve([CURVE, other])
    assert shared == [160, 320]
    assert mean == pytest.approx([0.55, 0.7])


def test_the_length_rule_is_the_better_one() -> None:
    assert length_rule([CURVE]) == ("the shorter answer wins", pytest.approx(0.56))
    assert length_rule([CURVE, replace(CURVE, longer_wins=0.7)]) == (
        "the longer answer wins",
        pytest.approx(0.57),
    )


def test_methods_that_were_judged_by_different_pairs_are_refused() -> None:
    check_same_pairs([CURVE, replace(CURVE, name="ipo"), replace(CURVE, seed=1, held_out_pairs=203)])
    with pytest.raises(RlhfRayError, match="seed 0: the held-out pairs differ"):
        check_same_pairs([CURVE, replace(CURVE, name="ipo", held_out_pairs=199)])


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "studies" / "hh.png"
    plot([CURVE, replace(CURVE, name=REWARD_MODEL)], path)
    assert path.read_bytes().startswith(b"\x89PNG")
