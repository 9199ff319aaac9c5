"""Loading: every message in full, and several mistakes at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf_ray.config.loading import dump_config, load_config, with_overrides
from rlhf_ray.config.schema import ModelSection, RunConfig
from rlhf_ray.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

SFT = "output_dir: runs/x\nsft:\n  dataset: {path: embedded:demonstrations}\n"
ONLINE = """\
output_dir: runs/x
online:
  num_steps: 2
  critic_init: policy
  dataset: {path: embedded:prompts}
  rewards:
    - {type: function, name: gold, function: "rlhf_ray.rewards.gold:friendliness"}
"""


def mistakes(source: object, overrides: Sequence[str] = ()) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)  # type: ignore[arg-type]
    return caught.value.mistakes


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(text: str, name: str = "my.yaml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def test_defaults_numbers_and_lists_are_read(in_folder: Path) -> None:
    optimizer = (
        "  optimizer: {learning_rate: 3e-6, weight_decay: 1}\n  kl_horizon: 1e4\n  prompts_per_step: 1_000\n"
    )
    config = load_config(written(ONLINE + optimizer))
    assert config.online is not None
    assert config.online.optimizer.learning_rate == 3e-6
    assert config.online.optimizer.weight_decay == 1.0
    assert (config.online.kl_horizon, config.online.prompts_per_step) == (10_000, 1000)
    assert config.online.rewards[0].weight == 1.0
    assert config.output_dir == Path("runs/x")
    assert config.stages == ("online",)


def test_only_true_and_false_are_truth_values(in_folder: Path) -> None:
    assert load_config(written(SFT + "training: {packing: True}")).training.packing is True
    assert mistakes(written(SFT + "training: {packing: yes}")) == (
        "my.yaml:4: training.packing=yes: must be true or false, not text",
    )


def test_a_micro_batch_has_one_layout(in_folder: Path) -> None:
    assert load_config(written(SFT + "training: {share_prompts: true}")).training.layout == "shared"
    assert load_config(written(SFT + "training: {packing: true}")).training.layout == "packed"
    assert load_config(written(SFT)).training.layout == "padded"
    assert mistakes(written(SFT + "training: {packing: true, share_prompts: true}")) == (
        "my.yaml:4: training.share_prompts=true: gives every prompt a row with its answers, and packing=true "
        "puts all into one row; leave one of the two out",
    )


def test_a_section_written_in_part_keeps_the_defaults_of_its_place() -> None:
    partly = {"dataset": {"path": "a.jsonl"}, "optimizer": {"weight_decay": 0.1}}
    config = load_config({"output_dir": "r", "pipeline": ["sft", "reward"], "sft": partly, "reward": partly})
    assert config.sft is not None and config.reward is not None
    assert (config.sft.optimizer.learning_rate, config.sft.optimizer.weight_decay) == (2e-5, 0.1)
    assert config.sft.optimizer.lr_scheduler == "constant"
    assert config.reward.optimizer.lr_scheduler == "linear"


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("sed: 3", "my.yaml:8: sed=3: unknown key; did you mean seed?"),
        (
            "foo: 3\nseed: 1",
            "my.yaml:8: foo=3: unknown key; known here: " + ", ".join(RunConfig.model_fields),
        ),
        (
            "  learning_rate: 1e-5",
            "my.yaml:8: online.learning_rate=1e-5: unknown key; "
            "learning_rate belongs in online.optimizer or online.critic_optimizer",
        ),
        (
            "  batch_size: 8",
            "my.yaml:8: online.batch_size=8: unknown key; batch_size belongs in sft, constitution, reward or "
            "preference",
        ),
        (
            "  optimizer: {learning_rate: 2}",
            "my.yaml:8: online.optimizer.learning_rate=2: must be a number greater than 0 and less than 1",
        ),
        (
            "  optimizer:\n    learning_rate: fast",
            "my.yaml:9: online.optimizer.learning_rate=fast: "
            "must be a number greater than 0 and less than 1, not text",
        ),
        ("  lam: 1.5", "my.yaml:8: online.lam=1.5: must be a number from 0 to 1"),
        ("  lam: 1e999", "my.yaml:8: online.lam=inf: must be a number from 0 to 1"),
        ("  kl_target: 0", "my.yaml:8: online.kl_target=0: must be a number greater than 0 or null"),
        (
            "  prompts_per_step: 2.5",
            "my.yaml:8: online.prompts_per_step=2.5: must be a whole number greater than 0",
        ),
        ('seed: "3"', "my.yaml:8: seed=3: must be a whole number at least 0, not text"),
        ("seed: true", "my.yaml:8: seed=true: must be a whole number at least 0, not true"),
        (
            "engine: {backend: vlm}",
            "my.yaml:8: engine.backend=vlm: must be vllm or transformers; did you mean vllm?",
        ),
        ("model: {path: 3}", "my.yaml:8: model.path=3: must be text, not a number"),
        ("model: [1, 2]", "my.yaml:8: model=[1, 2]: must be a section, not a list"),
        ("training: {zero_stage: 4}", "my.yaml:8: training.zero_stage=4: must be 0, 1, 2 or 3"),
        (
            "training: {lora: {rank: 0}}",
            "my.yaml:8: training.lora.rank=0: must be a whole number greater than 0",
        ),
        (
            "training: {lora: {target_modules: all}}",
            "my.yaml:8: training.lora.target_modules=all: must be all-linear or a list with at least 1 entry",
        ),
        (
            "training: {lora: {dropout: 0.1}}",
            "my.yaml:8: training.lora.dropout=0.1: unknown key; known here: rank, alpha, target_modules",
        ),
        (
            "placement: {policy: {cpus: many}}",
            "my.yaml:8: placement.policy.cpus=many: must be a number or auto",
        ),
        ("placement: {judge: {count: 2}}", "my.yaml:8: placement.judge.count=2: must be 1"),
        (
            "pipeline: [onlin]",
            "my.yaml:8: pipeline.0=onlin: must be sft, constitution, preferences, reward, preference or "
            "online; did you mean online?",
        ),
        (
            "preferences: {annotators: [{type: simulated}, {type: simulated}]}\n"
            "pipeline: [preferences, online]",
            "my.yaml:8: preferences.annotators: names must differ, these do not: simulated, simulated",
        ),
        (
            "constitution: {helpful_fraction: 0.5, dataset: {path: x}}\npipeline: [constitution, online]",
            "my.yaml:8: constitution.helpful_fraction=0.5: there is no helpful_dataset; name one, or remove "
            "helpful_fraction",
        ),
        (
            "preferences: {annotators: [{type: constitution, max_probability: 0.5}]}\n"
            "pipeline: [preferences, online]",
            "my.yaml:8: preferences.annotators.0.max_probability=0.5: must be a number greater than 0.5 and "
            "at most 1",
        ),
        ("seed: 1\nseed: 2", "my.yaml:8: seed: given twice, here and in line 9; keep one"),
        (
            "seed: !!python/name:os.system 1",
            "my.yaml:8: seed=1: the YAML tag tag:yaml.org,2002:python/name:os.system is not supported",
        ),
        (
            "  num_mini_batches: 3",
            "my.yaml:8: online.num_mini_batches=3: does not divide prompts_per_step * num_generations = 64",
        ),
        (
            "  kl_estimator: k3",
            "my.yaml:8: online.kl_estimator=k3: "
            "in the reward only k1 is unbiased; use k1, or kl_placement: loss",
        ),
        ("sft: {dataset: {path: a}}", "my.yaml: pipeline: missing; say in which order to run sft, online"),
    ],
)
def test_one_mistake_in_a_file(in_folder: Path, added: str, message: str) -> None:
    # A tag that is not supported leaves null behind, which is reported as well.
    assert mistakes(written(ONLINE + added + "\n"))[0] == message


REWARD_TYPES = (
    "ensemble, exact_match, format, function, http, judge, length, math, model, reasoning_gym or regex"
)


@pytest.mark.parametrize(
    ("rewards", "messages"),
    [
        ("[]", ["online.rewards=[]: must be a list with at least 1 entry"]),
        ("[{type: modl}]", [f"online.rewards.0.type=modl: must be {REWARD_TYPES}; did you mean model?"]),
        ("[{name: a}]", [f"online.rewards.0.type: missing; give {REWARD_TYPES}"]),
        ("[7]", [f"online.rewards.0=7: must be a section with type {REWARD_TYPES}, not a number"]),
        (
            "[{type: function, weight: high}]",
            [
                "online.rewards.0.name: missing; give text",
                "online.rewards.0.weight=high: must be a number, not text",
                "online.rewards.0.function: missing; give text",
            ],
        ),
        (
            "[{type: function, name: a, function: b:c, weight: 0}]",
            ["online.rewards: every weight is 0, so there is nothing to train on"],
        ),
        (
            "[{type: function, name: a, function: b:c, wait: 0}]",
            ["online.rewards.0.wait=0: unknown key; did you mean weight?"],
        ),
    ],
)
def test_mistakes_in_sections_told_apart_by_type(in_folder: Path, rewards: str, messages: list[str]) -> None:
    text = ONLINE[: ONLINE.index("  rewards")] + f"  rewards: {rewards}\n"
    assert mistakes(written(text)) == tuple(f"my.yaml:6: {message}" for message in messages)


def test_all_mistakes_at_once_in_the_order_of_the_file(in_folder: Path) -> None:
    text = """\
output_dir: runs/x
sed: 1
sft:
  dataset: {pth: a.jsonl}
  batch_size: 0
online:
  kl_estimator: k3
  critic_init: policy
  optimizer: {learning_rate: -1, lr: 1}
  dataset: {path: embedded:prompts}
  num_steps: 3
  rewards:
    - {type: function, name: gold, function: "m:f"}
"""
    assert mistakes(written(text), ["engine.dtype=float16", "online.num_stepz=3"]) == (
        "my.yaml: pipeline: missing; say in which order to run sft, online",
        "my.yaml:2: sed=1: unknown key; did you mean seed?",
        "my.yaml:4: sft.dataset.pth=a.jsonl: unknown key; did you mean path?",
        "my.yaml:4: sft.dataset.path: missing; give text",
        "my.yaml:5: sft.batch_size=0: must be a whole number greater than 0",
        "my.yaml:7: online.kl_estimator=k3: in the reward only k1 is unbiased; use k1, or kl_placement: loss",
        "my.yaml:9: online.optimizer.lr=1: unknown key; "
        "known here: learning_rate, lr_scheduler, warmup_steps, weight_decay, max_grad_norm",
        "my.yaml:9: online.optimizer.learning_rate=-1: must be a number greater than 0 and less than 1",
        "override engine.dtype=float16: must be auto, bfloat16 or float32; did you mean bfloat16?",
        "override online.num_stepz=3: unknown key; did you mean num_steps?",
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("foo", "override foo: write it as key.path=value"),
        ("a..b=1", "override a..b=1: write it as key.path=value"),
        ("seed=", "override seed=: has no value; write null for none"),
        ("seed=null", "override seed=null: must be a whole number at least 0, not null"),
        ("seed.x=1", "override seed.x=1: seed is a number, not a section"),
        ("onlin.x=1", "override onlin.x=1: onlin: unknown key; did you mean online?"),
        (
            "online.rewards.3.weight=0",
            "override online.rewards.3.weight=0: "
            "online.rewards is a list; name an entry by its number, 0 to 1, where 1 appends",
        ),
        (
            "online.rewards.weight=0",
            "override online.rewards.weight=0: "
            "online.rewards is a list; name an entry by its number, 0 to 1, where 1 appends",
        ),
        (
            "online.lam=[1",
            "override online.lam=[1: the value is not valid YAML "
            "(expected ',' or ']', but got '<stream end>'); put it in quotes",
        ),
        ("online.lam=2", "override online.lam=2: must be a number from 0 to 1"),
        (
            "online.kl_estimator=k2",
            "override online.kl_estimator=k2: "
            "in the reward only k1 is unbiased; use k1, or kl_placement: loss",
        ),
        (
            "online={num_steps: 1, num_steps: 2}",
            "override online={num_steps: 1, num_steps: 2}: online.num_steps: given twice; keep one",
        ),
        ("logging.wandb.api_key=7", "override logging.wandb.api_key=***: must be text or null, not a number"),
        (
            "logging.wandb={api_key: 7}",
            "override logging.wandb={api_key:***: "
            "logging.wandb.api_key=***: must be text or null, not a number",
        ),
    ],
)
def test_one_mistake_in_an_override(in_folder: Path, override: str, message: str) -> None:
    assert mistakes(written(ONLINE + "seed: 1\n"), [override])[0] == message


def test_overrides_change_add_and_create(in_folder: Path) -> None:
    config = load_config(
        written(ONLINE),
        [
            "online.optimizer.learning_rate=1e-5",
            "online.rewards.0.weight=2",
            "online.rewards.1={type: model, path: rm}",
            "online.critic_init=reward",
            "online.cliprange_value=null",
            "logging.wandb.project=mine",
            "preferences.annotators.0.error_rate=0.1",
            "pipeline=[preferences, online]",
            "preferences.dataset.path=embedded:prompts",
            "output_dir=a=b",
        ],
    )
    assert config.online is not None and config.preferences is not None and config.logging.wandb is not None
    assert config.online.optimizer.learning_rate == 1e-5
    assert [(reward.type, reward.name, reward.weight) for reward in config.online.rewards] == [
        ("function", "gold", 2.0),
        ("model", "proxy", 1.0),
    ]
    assert config.online.cliprange_value is None
    assert (config.logging.wandb.project, config.logging.wandb.mode) == ("mine", "offline")
    annotator = config.preferences.annotators[0]
    assert annotator.type == "simulated" and annotator.error_rate == 0.1
    assert config.output_dir == Path("a=b")


def test_the_last_override_of_a_key_counts() -> None:
    source = {"output_dir": "r", "sft": {"dataset": {"path": "a"}}}
    assert load_config(source, ["seed=1", "seed=2"]).seed == 2
    # A later override replaces the section that an earlier one wrote into.
    assert load_config(source, ["sft.optimizer.weight_decay=1", "sft.optimizer={}"]) == load_config(source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "my.yaml:1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (b"a: 1\n b: 2", "my.yaml:2: not valid YAML: mapping values are not allowed here"),
        (b"- 1", "my.yaml: must hold sections (key: value), not a list"),
        (b"a: \xff", "my.yaml: is not text in UTF-8"),
        (b"a: \x01", "my.yaml: not valid YAML: the character '\\x01' is not allowed"),
        (b'a: "\\Uffffffff"', "my.yaml: not valid YAML: an escape sequence names no character"),
        (b"[" * 5000, "my.yaml: not valid YAML: nested too deeply"),
    ],
)
def test_what_is_no_yaml(in_folder: Path, content: bytes, message: str) -> None:
    Path("my.yaml").write_bytes(content)
    assert mistakes("my.yaml") == (message,)


def test_odd_yaml_is_a_mistake(in_folder: Path) -> None:
    text = 'output_dir: "\\ud800"\nseed: !!int abc\nsft: &x {model: *x, dataset: {path: a}, ? [1] : 2}\n'
    assert mistakes(written(text))[:4] == (
        "my.yaml:1: output_dir='\\ud800': holds a character that is not text",
        "my.yaml:2: seed=abc: is not a number that can be read",
        "my.yaml:2: seed=null: must be a whole number at least 0, not null",
        "my.yaml:3: sft.model: an alias may not refer to the section that it stands in",
    )


def test_missing_files_are_looked_up_among_neighbours(in_folder: Path) -> None:
    written(SFT, "quick.yaml")
    assert mistakes("quik.yaml")[0].endswith("; did you mean quick.yaml?")
    assert mistakes(str(in_folder)) == (f"{in_folder}: is a folder; name a file in it",)
    assert len(mistakes("a\0b")) == 1 and len(mistakes("a" * 5000)) == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_packaged_configurations_load(path: Path, in_folder: Path) -> None:
    config = load_config(path)
    for name in (path.stem, f"configs/{path.stem}", f"configs/{path.name}"):
        assert load_config(name) == config


def test_mappings_may_hold_python_values() -> None:
    source: dict[str, object] = {
        "output_dir": Path("r"),
        "model": ModelSection(path="m"),
        "sft": {"dataset": {"path": "a"}},
    }
    assert load_config(source).model.path == "m"
    assert mistakes({**source, 3: 4, "seed": {1}}) == (
        "the key 3 must be text",
        "seed: must be text, a number, true, false, null, a list or a section, not set",
        "seed=null: must be a whole number at least 0, not null",
    )


def test_nothing_at_all() -> None:
    assert mistakes({}) == ("output_dir: missing; give a path",)
    assert mistakes({"output_dir": "r"}) == (
        "no stage: add one of the sections sft, constitution, preferences, reward, preference, online",
    )


def test_secrets_are_redacted_in_dumps_and_messages(in_folder: Path) -> None:
    secret = "hunter2-hunter2"
    text = f"{ONLINE}logging: {{wandb: {{api_key: {secret}}}}}\n"
    config = load_config(written(text))
    dumped = dump_config(config)
    assert dumped["logging"]["wandb"]["api_key"] == "***"  # type: ignore[index]
    assert secret not in json.dumps(dumped) and secret not in repr(config)
    for wrong in ("sed: 1", f"password: {secret}", f"cluster: {{hub_token: {secret}}}"):
        assert secret not in "\n".join(mistakes(written(text + wrong)))
    for override in (f"loging.wandb.api_key={secret}", f"wandb={{api_key: {secret}}}", f"api_key:{secret}"):
        assert secret not in "\n".join(mistakes(written(text), [override]))
    assert dumped["training"]["tokens_per_micro_batch"] == 4096  # type: ignore[index]


def test_dumps_are_json_and_load_again(in_folder: Path) -> None:
    config = load_config(written(ONLINE))
    dumped = json.loads(json.dumps(dump_config(config)))
    assert load_config(dumped) == config


def test_with_overrides_keeps_the_rest_secrets_included(in_folder: Path) -> None:
    config = load_config(written(f"{ONLINE}logging: {{wandb: {{api_key: abc}}}}\n"))
    changed = with_overrides(config, ["online.num_steps=9"])
    assert changed.online is not None and changed.logging.wandb is not None
    assert changed.online.num_steps == 9
    assert changed.logging.wandb.api_key is not None
    assert changed.logging.wandb.api_key.get_secret_value() == "abc"
    assert with_overrides(changed, ["online.num_steps=2"]) == config
    with pytest.raises(
        ConfigError, match=r"^override online\.num_steps=0: must be a whole number greater than 0$"
    ):
        with_overrides(config, ["online.num_steps=0"])
