"""The shape of a model: what its memory and its time depend on.

Read from the `config.json` of a folder or the header of a GGUF file; hub names are looked up in a table of
well-known models, since nothing here goes over the network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from rlhf_ray.config.model_checks import embedded_file
from rlhf_ray.config.schema import EMBEDDED_MODEL, LoraSection
from rlhf_ray.errors import ModelError


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder of the Llama family: gated MLP, grouped-query attention, RMS norms.

    Fields:
        width: of the hidden states. intermediate: of the MLP. vocabulary: of the output head.
        biases: whether q, k and v have one. head_norms: whether q and k are normalised.
        counted, adaptable: parameters, and name and inputs plus outputs of every layer that can have an
            adapter, where they are known otherwise; None counts them from the rest.
    """

    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    biases: bool = False
    head_norms: bool = False
    counted: int | None = None
    adaptable: tuple[tuple[str, int], ...] | None = None

    @property
    def queries(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Name of a matrix of a layer -> inputs, outputs."""
        return {
            "q_proj": (self.width, self.queries),
            "k_proj": (self.width, self.keys),
            "v_proj": (self.width, self.keys),
            "o_proj": (self.queries, self.width),
            "gate_proj": (self.width, self.intermediate),
            "up_proj": (self.width, self.intermediate),
            "down_proj": (self.intermediate, self.width),
        }

    @cached_property
    def layer_parameters(self) -> int:
        matrices = sum(inputs * outputs for inputs, outputs in self.linear.values())
        biases = self.queries + 2 * self.keys if self.biases else 0
        head_norms = 2 * self.head_dim if self.head_norms else 0
        return matrices + biases + head_norms + 2 * self.width

    @property
    def head(self) -> int:
        """Parameters of the output head, which a scalar model does not have."""
        return self.vocabulary * self.width

    @cached_property
    def parameters(self) -> int:
        if self.counted is not None:
            return self.counted
        embeddings = self.head * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings + self.width

    @property
    def scalar_parameters(self) -> int:
        """With one output a token in the head's place."""
        return self.parameters - (0 if self.tied else self.head) + self.width

    @property
    def computed(self) -> int:
        """Parameters that every token is multiplied with in the layers."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def largest_piece(self) -> int:
        """Parameters that ZeRO-3 gathers at a time, at the least."""
        return max(self.layer_parameters, self.head)

    def trained(self, lora: LoraSection | None) -> int:
        """Parameters that have a gradient; the head of a model that scores is left out, being small."""
        if lora is None:
            return self.parameters
        layers = self.adaptable
        if layers is None:
            layers = tuple((name, self.layers * sum(sizes)) for name, sizes in self.linear.items())
        if lora.target_modules != "all-linear":
            endings = tuple(f".{name}" for name in lora.target_modules)
            layers = tuple((name, size) for name, size in layers if f".{name}".endswith(endings))
        return lora.rank * sum(size for _, size in layers)

    def kv_bytes(self, bytes_per_value: int) -> int:
        """Of one token in the cache."""
        return 2 * self.layers * self.keys * bytes_per_value


def _llama(
    layers: int, width: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = False
) -> ModelShape:
    return ModelShape(layers, width, intermediate, heads, kv_heads, width // heads, vocabulary, tied)


def _qwen2(
    layers: int, width: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = False
) -> ModelShape:
    head_dim = width // heads
    return ModelShape(layers, width, intermediate, heads, kv_heads, head_dim, vocabulary, tied, biases=True)


def _qwen3(layers: int, width: int, intermediate: int, heads: int, tied: bool = False) -> ModelShape:
    return ModelShape(layers, width, intermediate, heads, 8, 128, 151_936, tied, head_norms=True)


_LLAMA2_70B = _llama(80, 8192, 28_672, 64, 8, 32_000)
_LLAMA3_8B = _llama(32, 4096, 14_336, 32, 8, 128_256)
_LLAMA3_70B = _llama(80, 8192, 28_672, 64, 8, 128_256)

KNOWN = {
    # As the config.json of each says.
    "HuggingFaceTB/SmolLM2-135M": _llama(30, 576, 1536, 9, 3, 49_152, tied=True),
    "HuggingFaceTB/SmolLM2-360M": _llama(32, 960, 2560, 15, 5, 49_152, tied=True),
    "HuggingFaceTB/SmolLM2-1.7B": _llama(24, 2048, 8192, 32, 32, 49_152, tied=True),
    "Qwen/Qwen2.5-0.5B": _qwen2(24, 896, 4864, 14, 2, 151_936, tied=True),
    "Qwen/Qwen2.5-1.5B": _qwen2(28, 1536, 8960, 12, 2, 151_936, tied=True),
    "Qwen/Qwen2.5-3B": _qwen2(36, 2048, 11_008, 16, 2, 151_936, tied=True),
    "Qwen/Qwen2.5-7B": _qwen2(28, 3584, 18_944, 28, 4, 152_064),
    "Qwen/Qwen2.5-14B": _qwen2(48, 5120, 13_824, 40, 8, 152_064),
    "Qwen/Qwen2.5-32B": _qwen2(64, 5120, 27_648, 40, 8, 152_064),
    "Qwen/Qwen2.5-72B": _qwen2(80, 8192, 29_568, 64, 8, 152_064),
    "Qwen/Qwen2.5-Math-1.5B": _qwen2(28, 1536, 8960, 12, 2, 151_936, tied=True),
    "Qwen/Qwen2.5-Math-7B": _qwen2(28, 3584, 18_944, 28, 4, 152_064),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _qwen2(28, 1536, 8960, 12, 2, 151_936),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _qwen2(28, 3584, 18_944, 28, 4, 152_064),
    "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 3072, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 6144, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(36, 2560, 9728, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(36, 4096, 12_288, 32),
    "Qwen/Qwen3-14B": _qwen3(40, 5120, 17_408, 40),
    "Qwen/Qwen3-32B": _qwen3(64, 5120, 25_600, 64),
    "mistralai/Mistral-7B-v0.3": _llama(32, 4096, 14_336, 32, 8, 32_768),
    "meta-llama/Llama-2-7b": _llama(32, 4096, 11_008, 32, 32, 32_000),
    "meta-llama/Llama-2-13b": _llama(40, 5120, 13_824, 40, 40, 32_000),
    "meta-llama/Llama-2-70b": _LLAMA2_70B,
    "meta-llama/Llama-3.2-1B": _llama(16, 2048, 8192, 32, 8, 128_256, tied=True),
    "meta-llama/Llama-3.2-3B": _llama(28, 3072, 8192, 24, 8, 128_256, tied=True),
    "meta-llama/Meta-Llama-3-8B": _LLAMA3_8B,
    "meta-llama/Meta-Llama-3-70B": _LLAMA3_70B,
    "meta-llama/Llama-3.1-8B": _LLAMA3_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA3_70B,
    "meta-llama/Llama-3.3-70B": _LLAMA3_70B,
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B": _LLAMA3_8B,
    "Skywork/Skywork-Reward-V2-Llama-3.2-1B": _llama(16, 2048, 8192, 32, 8, 128_256, tied=True),
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": _qwen3(28, 1024, 3072, 16, tied=True),
    "Skywork/Skywork-Reward-V2-Qwen3-1.7B": _qwen3(28, 2048, 6144, 16, tied=True),
    "Skywork/Skywork-Reward-V2-Qwen3-8B": _qwen3(36, 4096, 12_288, 32),
}
"""Hub name -> shape; of the base model, which its tuned variants share."""
_VARIANTS = ("-Instruct", "-Chat", "-chat", "-hf", "-chat-hf", "-Base", "-it")


def known_shape(name: str) -> ModelShape | None:
    """Of a hub name. A copy elsewhere under the same model name, and a tuned variant, have the same shape."""
    bare = {hub.rpartition("/")[2].lower(): shape for hub, shape in KNOWN.items()}
    model = name.rpartition("/")[2].lower()
    endings = ("", *(ending.lower() for ending in _VARIANTS))
    fitting = (bare.get(model.removesuffix(ending)) for ending in endings if model.endswith(ending))
    return next((shape for shape in fitting if shape is not None), None)


def shape_of(path: str) -> ModelShape:
    """Of a model as a configuration names it.

    Raises:
        ModelError: its shape cannot be told from here.
    """
    if path == EMBEDDED_MODEL:
        file = embedded_file()
        if file is not None:
            return shape_of_gguf(file)
    local = Path(path).expanduser()
    if local.is_dir():
        return _shape_of_folder(local)
    if local.suffix == ".gguf" and local.is_file():
        return shape_of_gguf(local)
    shape = known_shape(path) or _cached_shape(path)
    if shape is None:
        raise ModelError(
            f"model.path={path}: its shape is not known here, and planning asks no network; name a folder "
            "with its config.json, or a model of the same shape"
        )
    return shape


def shape_of_config(config: Mapping[str, object], name: str) -> ModelShape:
    """Of a Hugging Face configuration.

    Raises:
        ModelError: it is not a dense decoder of a known kind.
    """
    inner = config.get("text_config")
    fields = {**config, **(inner if isinstance(inner, dict) else {})}
    kind = str(fields.get("model_type"))
    if kind not in ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "gemma", "gemma2"):
        raise ModelError(f"{name}: planning knows dense decoders such as llama and qwen2, not {kind}")

    def whole(key: str, default: int | None = None) -> int:
        found = fields.get(key, default)
        if not isinstance(found, int):
            raise ModelError(f"{name}: its config.json has no {key}")
        return found

    heads, width = whole("num_attention_heads"), whole("hidden_size")
    given = fields.get("head_dim")
    tied_by_default = kind.startswith("gemma")
    return ModelShape(
        layers=whole("num_hidden_layers"),
        width=width,
        intermediate=whole("intermediate_size"),
        heads=heads,
        kv_heads=whole("num_key_value_heads", heads),
        head_dim=given if isinstance(given, int) else width // heads,
        vocabulary=whole("vocab_size"),
        tied=bool(fields.get("tie_word_embeddings", tied_by_default)),
        biases=kind == "qwen2" or bool(fields.get("attention_bias")),
        head_norms=kind == "qwen3",
    )


def _shape_of_folder(folder: Path) -> ModelShape:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path={folder}: config.json in it cannot be used ({error})") from error
    return shape_of_config(config, f"model.path={folder}")


def _cached_shape(name: str) -> ModelShape | None:
    """Of a hub model whose configuration was downloaded before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return _shape_of_folder(Path(found).parent) if isinstance(found, str) else None


@lru_cache(maxsize=4)
def shape_of_gguf(path: Path) -> ModelShape:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    kind = str(reader.fields["general.architecture"].contents())

    def whole(key: str, default: int | None = None) -> int:
        field = reader.fields.get(f"{kind}.{key}")
        if field is None and default is None:
            raise ModelError(f"model.path={path}: its header has no {kind}.{key}")
        return int(field.contents()) if field is not None else int(default or 0)

    names = {tensor.name for tensor in reader.tensors}
    heads, width = whole("attention.head_count"), whole("embedding_length")
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    return ModelShape(
        layers=whole("block_count"),
        width=width,
        intermediate=whole("feed_forward_length"),
        heads=heads,
        kv_heads=whole("attention.head_count_kv", heads),
        head_dim=whole("attention.key_length", width // heads),
        vocabulary=int(max(embedding.shape)),
        tied="output.weight" not in names,
        biases="blk.0.attn_q.bias" in names,
        head_norms="blk.0.attn_q_norm.weight" in names,
    )
