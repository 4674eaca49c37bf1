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


def _latent_attention(
    hidden: int, heads: int, q_rank: int | None, kv_rank: int, nope: int, rope: int, value: int
) -> int:
    """Weights of one layer's latent attention (MLA)."""
    query = heads * (nope + rope)
    query_params = hidden * query if q_rank is None else q_rank * (hidden + query)
    key_value = hidden * (kv_rank + rope) + kv_rank * heads * (nope + value)
    return query_params + key_value + heads * value * hidden


def _deepseek_v3(name: str) -> ModelShape:
    return ModelShape(
        *(name, 61, 7168, 2048, 128, 128, 192, 129280, 163840),
        num_experts=257,
        num_dense_layers=3,
        dense_intermediate_size=18432,
        latent_dim=576,
        attention_params=_latent_attention(7168, 128, 1536, 512, 128, 64, 128),
    )


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
        ModelShape("deepseek-r1-0528-qwen3-8b", 36, 4096, 12288, 32, 8, 128, 151936, 131072),
        ModelShape(
            *("deepseek-v2-lite", 27, 2048, 1408, 16, 16, 192, 102400, 163840),
            num_experts=66,
            num_dense_layers=1,
            dense_intermediate_size=10944,
            latent_dim=576,
            attention_params=_latent_attention(2048, 16, None, 512, 128, 64, 128),
        ),
        ModelShape(
            *("deepseek-v2", 60, 5120, 1536, 128, 128, 192, 102400, 163840),
            num_experts=162,
            num_dense_layers=1,
            dense_intermediate_size=12288,
            latent_dim=576,
            attention_params=_latent_attention(5120, 128, 1536, 512, 128, 64, 128),
        ),
        _deepseek_v3("deepseek-v3"),
        _deepseek_v3("deepseek-r1"),
        ModelShape(*("llama-3.2-3b", 28, 3072, 8192, 24, 8, 128, 128256, 131072), is_tied=True),
        ModelShape("llama-2-7b", 32, 4096, 11008, 32, 32, 128, 32000, 4096),
        ModelShape("llama-2-13b", 40, 5120, 13824, 40, 40, 128, 32000, 4096),
        ModelShape("qwen3-30b-a3b", 48, 2048, 768, 32, 4, 128, 151936, 40960, num_experts=128),
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

    if metadata_rank := file.metadata.get(f"{architecture}.attention.kv_lora_rank"):
        raise ConfigError(
            f"model.path: {name} is a GGUF file with latent attention (kv_lora_rank"
            f" {metadata_rank}), which the native engine does not read; name its Hugging Face"
            " folder",
            param="model.path",
        )
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
    num_layers = size("num_hidden_layers", "n_layer")
    expert_size = size("moe_intermediate_size", default=dense_size)
    # Qwen2's shared expert is a multiple of a routed one.
    num_shared = size("shared_expert_intermediate_size", default=0) // max(1, expert_size)
    latent_dim = attention = 0
    head_dim = size("head_dim", default=hidden // heads)
    if text.get("kv_lora_rank"):
        nope, rope = size("qk_nope_head_dim"), size("qk_rope_head_dim")
        latent_dim, head_dim = size("kv_lora_rank") + rope, nope + rope
        ranks = (text.get("q_lora_rank"), size("kv_lora_rank"))
        attention = _latent_attention(hidden, heads, *ranks, nope, rope, size("v_head_dim"))
    num_dense = _num_dense_layers(text, num_layers) if num_experts else 0
    shape = ModelShape(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=expert_size if num_experts else dense_size,
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", default=heads),
        head_dim=head_dim,
        vocab_size=size("vocab_size"),
        max_position=size("max_position_embeddings", "n_positions"),
        is_tied=bool(text.get("tie_word_embeddings", False)),
        num_experts=num_experts + size("n_shared_experts", default=num_shared),
        num_dense_layers=num_dense,
        dense_intermediate_size=dense_size if num_dense else 0,
        latent_dim=latent_dim,
        attention_params=attention,
    )
    quantization = config.get("quantization_config") or {}
    bits = quantization.get("bits") or quantization.get("w_bit")
    groups = (quantization.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups]
    if weights and all(each.get("type") == "int" for each in weights):  # compressed-tensors
        bits = max(each.get("num_bits", 0) for each in weights)
    return ModelFacts(shape, f"int{bits}" if bits in (4, 8) else "dense")


def _num_dense_layers(text: dict[str, Any], num_layers: int) -> int:
    """Layers of a network with experts that have a plain MLP instead."""
    step, plain = text.get("decoder_sparse_step") or 1, text.get("mlp_only_layers") or ()
    first = text.get("first_k_dense_replace") or 0
    return sum(i < first or i in plain or (i + 1) % step != 0 for i in range(num_layers))


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
