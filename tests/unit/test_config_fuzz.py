"""Whatever is written, loading succeeds or raises `ConfigError`, in words of ours."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.config import outline
from rlhf_ray.config.loading import load_config, with_overrides
from rlhf_ray.errors import ConfigError

FULL = {
    "output_dir": "r",
    "pipeline": ["sft", "preferences", "reward", "online"],
    "sft": {"dataset": {"path": "a"}, "model": {"path": "b"}},
    "preferences": {"annotators": [{"type": "simulated"}, {"type": "file", "dataset": {"path": "a"}}]},
    "reward": {"optimizer": {"learning_rate": 1e-4}},
    "online": {
        "num_steps": 1,
        "dataset": {"path": "a"},
        "rewards": [{"type": "model"}, {"type": "function", "name": "f", "function": "m:f"}],
    },
    "logging": {"wandb": {"api_key": "k"}},
}
REAL_PATHS = [
    *sorted(".".join((*map(str, path), key)) for path, keys in outline.all_sections() for key in keys),
    "online.rewards.0.type",
    "online.rewards.1.weight",
    "preferences.annotators.1.dataset.path",
    "pipeline.0",
]
KEYS = sorted({key for _, keys in outline.all_sections() for key in keys} | {"0", "type", "weight", "", "x"})
KEY_PATHS = (
    st.sampled_from(REAL_PATHS)
    | st.builds("{}.{}".format, st.sampled_from(REAL_PATHS), st.sampled_from(KEYS) | st.text(max_size=3))
    | st.lists(st.sampled_from(KEYS) | st.text(max_size=4), min_size=1, max_size=4).map(".".join)
)
VALUES = (
    st.sampled_from(
        [
            "null",
            "true",
            "1",
            "-1",
            "1e-5",
            ".5",
            "[]",
            "{}",
            "[{type: model}]",
            "k1",
            "a: b",
            "&a [*a]",
            "[[]]",
        ]
    )
    | st.integers().map(str)
    | st.floats().map(str)
    | st.text(max_size=8)
)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.builds("{}={}".format, KEY_PATHS, VALUES) | st.text(max_size=12), max_size=4))
def test_any_override_succeeds_or_is_a_config_error(overrides: list[str]) -> None:
    try:
        config = load_config(FULL, overrides)
    except ConfigError as error:
        assert all(error.mistakes)
        assert not any(
            word in str(error) for word in ("pydantic", "Value error", "Input should", "Field required")
        )
    else:
        assert with_overrides(config, []) == config


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["model", "k1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | TREES.map(json.dumps) | st.lists(KEY_PATHS.map("{}: ".format)).map("\n ".join))
def test_any_text_succeeds_or_is_a_config_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        load_config(path)
    except ConfigError as error:
        assert all(error.mistakes)
