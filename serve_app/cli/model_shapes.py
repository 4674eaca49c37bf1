"""The sizes of a model for `xeray plan`: from a GGUF file, a config.json, or a well-known name."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.config.model_source import ModelFormat, resolve_model
from serve_app.config.schema import ModelSection
from serve_app.core.errors import ConfigError
from serve_app.hardware.memory import ModelShape
from serve_app.models.gguf import GGMLType, GGUFFile

# From the models' published config.json files.
KNOWN_SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("deepseek-r1-distill-qwen-1.5b", 28, 1536, 8960, 12, 2, 128, 151936, 131072),
        ModelShape("deepseek-r1-distill-qwen-7b", 28, 3584, 18944, 28, 4, 128, 152064, 131072),
        ModelShape("deepseek-r1-distill-llama-8b", 32, 4096, 14336, 32, 8, 128, 128256, 131072),
        ModelShape("deepseek-r1-distill-qwen-14b", 48, 5120, 13824, 40, 8, 128, 152064, 131072),
        ModelShape("deepseek-r1-distill-qwen-32b", 64, 5120, 27648, 40, 8, 128, 152064, 131072),
        ModelShape("deepseek-r1-distill-llama-70b", 80, 8192, 28672, 64, 8, 128, 128256, 131072),
    )
}

_DENSE_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.F64)
_EIGHT_BIT_TYPES = (GGMLType.Q8_0, GGMLType.Q8_1, GGMLType.Q8_K, GGMLType.Q6_K)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model's shape, and the weight format in which its files hold it (dense, int8, int4)."""

    shape: ModelShape
    stored_format: str


def read_model(name: str) -> ModelFacts:
    """Return the facts of `name`: a known name, 'embedded', a .gguf file or a Hugging Face folder.

    Raises ConfigError, one line, where there is no such model or its sizes cannot be told.
    """
    known = KNOWN_SHAPES.get(name.lower())
    if known is not None:
        return ModelFacts(known, "dense")
    try:
        source = resolve_model(ModelSection(path=name))
    except ConfigError as error:
        if Path(name).expanduser().exists():
            raise
        raise ConfigError(
            f"{error.message}; or a well-known shape: {', '.join(KNOWN_SHAPES)}", param="model.path"
        ) from None
    if source.format is ModelFormat.GGUF:
        return _from_gguf(GGUFFile(source.path), source.name)
    return _from_config(_read_json(source.path / "config.json"), source.name)


def _from_gguf(file: GGUFFile, name: str) -> ModelFacts:
    architecture = file.metadata.get("general.architecture", "")

    def size(key: str, default: int | None = None) -> int:
        value = file.metadata.get(f"{architecture}.{key}", default)
        if not isinstance(value, int):
            raise ConfigError(
                f"model.path: {file.path.name} does not tell {architecture}.{key}",
                param="model.path",
            )
        return value

    hidden, heads = size("embedding_length"), size("attention.head_count")
    shape = ModelShape(
        name=name,
        num_layers=size("block_count"),
        hidden_size=hidden,
        intermediate_size=size("feed_forward_length"),
        num_heads=heads,
        num_kv_heads=size("attention.head_count_kv", heads),
        head_dim=size("attention.key_length", hidden // heads),
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        max_position=size("context_length"),
        is_tied="output.weight" not in file.tensors,
        num_experts=size("expert_count", 0),
    )
    stored: Counter[GGMLType] = Counter()
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1 and tensor.name.startswith("blk."):
            stored[tensor.ggml_type] += tensor.nbytes
    return ModelFacts(shape, _format_of(stored.most_common(1)[0][0]) if stored else "dense")


def _format_of(ggml_type: GGMLType) -> str:
    if ggml_type in _DENSE_TYPES:
        return "dense"
    return "int8" if ggml_type in _EIGHT_BIT_TYPES else "int4"


def _from_config(config: dict[str, Any], name: str) -> ModelFacts:
    text = config.get("text_config", config)
    if text.get("kv_lora_rank"):
        raise ConfigError(
            f"model.path: {name} uses multi-head latent attention ({text.get('model_type')}),"
            " which is not planned for yet",
            param="model.path",
        )

    def size(*keys: str, default: int | None = None) -> int:
        value = next((text[key] for key in keys if text.get(key) is not None), default)
        if not isinstance(value, int):
            raise ConfigError(
                f"model.path: the config.json of {name} does not tell {keys[0]}", param="model.path"
            )
        return value

    hidden, heads = size("hidden_size", "n_embd"), size("num_attention_heads", "n_head")
    num_experts = size("num_local_experts", "num_experts", "n_routed_experts", default=0)
    dense_size = size("intermediate_size", "n_inner", default=4 * hidden)
    shape = ModelShape(
        name=name,
        num_layers=size("num_hidden_layers", "n_layer"),
        hidden_size=hidden,
        intermediate_size=size("moe_intermediate_size", default=dense_size),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", default=heads),
        head_dim=size("head_dim", default=hidden // heads),
        vocab_size=size("vocab_size"),
        max_position=size("max_position_embeddings", "n_positions"),
        is_tied=bool(text.get("tie_word_embeddings", False)),
        num_experts=num_experts + size("n_shared_experts", default=0),
    )
    quantization = config.get("quantization_config") or {}
    bits = quantization.get("bits") or quantization.get("w_bit")
    return ModelFacts(shape, f"int{bits}" if bits in (4, 8) else "dense")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path: cannot read {path.name}: {error}", param="model.path"
        ) from None
    if not isinstance(document, dict):
        raise ConfigError(f"model.path: {path.name} is no JSON object", param="model.path")
    return document
