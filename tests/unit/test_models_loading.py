from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from rlhf_ray.config.schema import ModelSection
from rlhf_ray.errors import ModelError
from rlhf_ray.models.batching import collate, last_positions
from rlhf_ray.models.heads import ScalarModel
from rlhf_ray.models.loading import (
    eos_token_ids,
    load_policy_model,
    load_scalar_model,
    load_tokenizer,
    materialise,
    max_model_length,
    save_model_folder,
)
from rlhf_ray.types import Ragged
from tests.tiny import CHATML, tiny_model_folder, tiny_tokenizer

IDS = torch.tensor([[1, 30, 31, 32, 2]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model_folder(tmp_path / "tiny")


def section(folder: Path, **options: object) -> ModelSection:
    return ModelSection(path=str(folder), **options)


def saved(model: torch.nn.Module, folder: Path) -> Path:
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_model_folder(model, state, tiny_tokenizer(), folder)  # type: ignore[arg-type]
    return folder


def test_folders_stay_and_missing_ones_are_errors(folder: Path) -> None:
    assert materialise(section(folder)) == folder
    for path, problem in {
        str(folder / "nowhere"): "no such folder",
        "./nowhere": "no such folder",
        str(folder / "nowhere.gguf"): "no such file",
    }.items():
        with pytest.raises(ModelError, match=f"model.path=.*nowhere.*: {problem}"):
            materialise(ModelSection(path=path))


def test_hub_names_are_found_in_the_hubs_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    name = ModelSection(path="someone/some-model")
    with pytest.raises(ModelError, match=r"model.path=someone/some-model: .* not to be had from the hub"):
        materialise(name)
    cached = tmp_path / "models--someone--some-model"
    snapshot = cached / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    assert materialise(name) == snapshot


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(section(tmp_path))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_policy_model(section(tmp_path))


def test_chat_template_comes_from_the_section_or_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(section(folder)).chat_template == CHATML
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    own = load_tokenizer(section(folder, chat_template=str(template)))
    assert own.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    with pytest.raises(ModelError, match=r"model\.chat_template=.*nowhere: cannot be read \(No such file"):
        load_tokenizer(section(folder, chat_template=str(tmp_path / "nowhere")))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"no chat template; name a Jinja file in model\.chat_template"):
        load_tokenizer(section(folder))


def test_every_eos_id_ends_an_answer_and_the_tokenizers_comes_first(folder: Path) -> None:
    tokenizer = load_tokenizer(section(folder))
    assert eos_token_ids(section(folder), tokenizer) == (2,)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [0, 2, 7]}))
    assert eos_token_ids(section(folder), tokenizer) == (2, 0, 7)
    path.unlink()
    assert eos_token_ids(section(folder), tokenizer) == (2,)


def test_length_that_the_model_was_made_for(folder: Path) -> None:
    assert max_model_length(section(folder)) == 512


@pytest.mark.parametrize("load", [load_policy_model, lambda s: load_scalar_model(s, seed=0)])
def test_dropout_is_off_wherever_it_hides(folder: Path, load) -> None:  # type: ignore[no-untyped-def]
    """Llama keeps the probability of its attention dropout outside any nn.Dropout."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.5}))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train().model
    ours = load(section(folder)).train().model
    with torch.no_grad():
        assert not torch.equal(plain(IDS).last_hidden_state, plain(IDS).last_hidden_state)
        assert torch.equal(ours(IDS).last_hidden_state, ours(IDS).last_hidden_state)
        torch.testing.assert_close(ours(IDS).last_hidden_state, plain.eval()(IDS).last_hidden_state)


def test_new_head_depends_on_the_seed_alone(folder: Path) -> None:
    torch.manual_seed(1)
    first = load_scalar_model(section(folder), seed=5).score.weight
    torch.manual_seed(2)
    again, other = (load_scalar_model(section(folder), seed=seed).score.weight for seed in (5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_new_head_has_the_standard_deviation_of_stiennon(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, hidden=1024, layers=1)
    weight = load_scalar_model(section(folder), seed=0).score.weight.detach()
    # Of 1024 normal numbers the standard deviation is known to 2.2 % (one standard error).
    assert float(weight.std()) == pytest.approx(1 / 1025, rel=0.09)
    assert float(weight.mean()) == pytest.approx(0, abs=4 / 1025 / 32)


def test_a_reward_model_keeps_its_head_and_scores_alike_everywhere(folder: Path, tmp_path: Path) -> None:
    network = load_scalar_model(section(folder), seed=3)
    reward_folder = saved(network, tmp_path / "reward")
    again = load_scalar_model(section(reward_folder), seed=4)
    assert torch.equal(again.score.weight, network.score.weight)

    # Any other tool: the head's logits are indexed at the last token; its own pooling would skip the EOS.
    plain = AutoModelForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float32).eval()
    assert (type(plain), plain.config.num_labels) == (LlamaForSequenceClassification, 1)
    rows = Ragged.from_rows([IDS[0].tolist(), [1, 9, 2]], np.int32)
    ours = ScalarModel(network)(collate(rows, last_positions(rows), "padded", torch.device("cpu")))
    theirs = [
        plain.score(plain.model(torch.tensor([row.tolist()])).last_hidden_state)[0, -1, 0] for row in rows
    ]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-5, atol=1e-6)


def test_a_saved_policy_is_an_ordinary_model(folder: Path, tmp_path: Path) -> None:
    network = load_policy_model(section(folder))
    with torch.no_grad():
        network.model.embed_tokens.weight.add_(0.01)
    policy_folder = saved(network, tmp_path / "policy")
    plain = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, network.eval()(IDS).logits)
    assert plain.config.use_cache is True
    assert plain.generation_config.eos_token_id == 2
    assert not list(policy_folder.glob("*.bin")), "safetensors only"
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    assert tokenizer.chat_template == CHATML
    text = "How do I boil an egg?"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_survive_saving(tmp_path: Path, tied: bool) -> None:
    network = load_policy_model(section(tiny_model_folder(tmp_path / "from", tied=tied)))
    plain = AutoModelForCausalLM.from_pretrained(saved(network, tmp_path / "to"), dtype=torch.float32)
    assert (plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()) == tied
    assert torch.equal(plain.lm_head.weight, network.lm_head.weight)


def test_a_classifier_of_two_labels_is_no_reward_model(folder: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(folder, num_labels=2)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "two")
    with pytest.raises(
        ModelError, match=r"model.path=.*two: a classifier of 2 labels; a reward model has one"
    ):
        load_scalar_model(section(tmp_path / "two"), seed=0)


def test_loaded_dtype_is_the_one_asked_for(folder: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert {p.dtype for p in load_policy_model(section(folder)).parameters()} == {torch.float32}
    narrow = load_scalar_model(section(folder), seed=0, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
