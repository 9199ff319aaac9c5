"""Low-rank adapters (LoRA; Hu et al. 2021): a frozen matrix W computes as W + alpha / rank * B A, and only
A and B are trained. The only place that knows peft.

The adapters are put into the model itself, so that its modules keep their places. A matrix then goes by the
name `….base_layer.weight`; `checkpoint_weights` tells all names as a checkpoint without adapters has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_ray.config.schema import LoraSection
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.heads import PolicyModel, ScalarModel

_ADAPTER = "default"
"""peft's own name for the only adapter of a model; not part of the names in an adapter's folder."""
_HEAD = "score"


def linear_layers(model: PreTrainedModel) -> dict[str, int]:
    """Name -> inputs plus outputs of every layer that can have an adapter: the linear ones of the backbone.

    Not the head: a language model's is often the embedding once more, and a scalar model's is trained in
    full.
    """
    prefix = model.base_model_prefix
    return {
        f"{prefix}.{name}": sum(layer.weight.shape)
        for name, layer in model.get_submodule(prefix).named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
    }


def adapted_layers(layers: Iterable[str], lora: LoraSection) -> list[str]:
    """Those of the layers that `target_modules` names, by their last name or by more of their path."""
    if lora.target_modules == "all-linear":
        return list(layers)
    return [layer for layer in layers if any(_is_named(layer, name) for name in lora.target_modules)]


def target_mistake(layers: Iterable[str], lora: LoraSection) -> str | None:
    """What is wrong with `target_modules` for a model of such layers."""
    layers = list(layers)
    if not layers:
        return "the model has no linear layers to adapt"
    for name in lora.target_modules if lora.target_modules != "all-linear" else ():
        if not any(_is_named(layer, name) for layer in layers):
            return f"no linear layer is called {name}; use all-linear, or {', '.join(_names(layers))}"
    return None


def _is_named(layer: str, name: str) -> bool:
    return f".{layer}".endswith(f".{name}")


def _names(layers: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))


def add_adapter(module: PolicyModel | ScalarModel, lora: LoraSection, seed: int) -> None:
    """Freeze the model and put adapters into it, in place. B is zero, so that nothing it computes changes; A
    is drawn from the seed alone, so that every rank has the same. A scalar model's head stays trainable.

    Raises:
        ConfigError: a name in `target_modules` is that of no layer.
    """
    model = module.model
    layers = list(linear_layers(model))
    if mistake := target_mistake(layers, lora):
        raise ConfigError(f"training.lora.target_modules: {mistake}")
    targets = _names(layers) if lora.target_modules == "all-linear" else list(lora.target_modules)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        task_type="SEQ_CLS" if isinstance(module, ScalarModel) else "CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, _ADAPTER)
    if isinstance(module, ScalarModel):
        model.get_submodule(_HEAD).requires_grad_(True)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before any training, for as long as the context lasts."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
    assert layers, "the model has no adapters: what it was before training is gone"
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@dataclass(frozen=True)
class CheckpointWeight:
    """A weight as a checkpoint without adapters has it.

    Fields:
        parameter: the whole of it, or the frozen matrix under the adapter.
        layer: the adapter; None where there is none.
    """

    parameter: nn.Parameter
    layer: LoraLinear | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What has to be whole for `merged`."""
        return [self.parameter, *(self._low_rank() if self.layer else ())]

    @property
    def is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters)

    def _low_rank(self) -> Iterator[nn.Parameter]:
        assert self.layer is not None
        for part in (self.layer.lora_A, self.layer.lora_B):
            yield from part.parameters()

    def merged(self) -> torch.Tensor:
        """W + alpha / rank * B A as a new tensor, in the type of W; without an adapter the parameter
        itself."""
        weight = self.parameter.detach()
        return weight if self.layer is None else weight + self.layer.get_delta_weight(_ADAPTER).detach()


def checkpoint_weights(module: nn.Module) -> dict[str, CheckpointWeight]:
    """Name in a checkpoint -> weight, in the order of `named_parameters`; a shared weight appears once."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLinear)}
    found = {}
    for name, parameter in module.named_parameters():
        owner, _, own = name.rpartition(".base_layer.")
        if owner in layers:
            found[f"{owner}.{own}"] = CheckpointWeight(parameter, layers[owner] if own == "weight" else None)
        elif not _is_low_rank(name):
            found[name] = CheckpointWeight(parameter)
    return found


def _is_low_rank(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def save_adapter(model: PreTrainedModel, trained: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a folder that `PeftModel.from_pretrained(base, folder)` loads.

    Args:
        trained: name in the model -> whole tensor on CPU, of every trained parameter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    heads = sorted({name.split(".")[0] for name in trained if not _is_low_rank(name)})
    config: LoraConfig = model.peft_config[_ADAPTER]  # type: ignore[assignment]
    replace(config, modules_to_save=heads or None, inference_mode=True).save_pretrained(str(folder))
    tensors = {
        f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": tensor.contiguous()
        for name, tensor in trained.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
