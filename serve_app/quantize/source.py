"""The model to quantize as a Hugging Face folder: as it is, or written from a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import decoders, processors

from serve_app.core.errors import ConfigError
from serve_app.models.config import NetworkConfig
from serve_app.models.gguf import GGUFFile
from serve_app.models.gguf_config import config_from_gguf
from serve_app.models.loading.gguf_source import ROPE_FACTORS, GGUFSource
from serve_app.models.loading.loader import gguf_eos
from serve_app.models.loading.source import check_names, expected_shapes
from serve_app.models.packed import PackedRows
from serve_app.models.quantized import QuantizedWeight
from serve_app.quantize.folder import FolderWriter
from serve_app.text.gguf_vocabulary import load_gguf_parts
from serve_app.text.parts import TokenizerParts
from serve_app.text.vocabulary import Spelling

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_DTYPE = torch.bfloat16


def export_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file as a Hugging Face folder, its weights dequantized to bfloat16.

    Raises ConfigError where the file holds something that a config.json cannot say.
    """
    file = GGUFFile(path)
    embedding = file.tensors.get("token_embd.weight")
    vocab_size = embedding.shape[0] if embedding else 1
    config = config_from_gguf(file.metadata, vocab_size, frozenset(file.tensors))
    if ROPE_FACTORS in file.tensors:
        raise ConfigError(
            f"model: {path.name} holds its rotary scaling as numbers, whose formula it does not"
            " tell; quantize the model's Hugging Face folder instead",
            param="model",
        )
    folder.mkdir(parents=True, exist_ok=True)
    source = GGUFSource(file, config)
    check_names(source, config)
    parts = load_gguf_parts(path)
    eos_ids = list(dict.fromkeys((*parts.eos_token_ids, *gguf_eos(file.metadata))))
    _write_json(folder / "config.json", _config_json(config, parts, eos_ids))
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": parts.bos_token_id, "eos_token_id": eos_ids},
    )
    write_tokenizer(parts, folder, config.max_position)
    with FolderWriter(folder) as writer:
        for name, weight in _dense_weights(source, config):
            writer.add(name, weight)


def _dense_weights(source: GGUFSource, config: NetworkConfig) -> Iterator[tuple[str, torch.Tensor]]:
    for name in expected_shapes(config):
        weight: torch.Tensor | PackedRows | QuantizedWeight = source.read(name)
        if isinstance(weight, PackedRows):
            weight = weight.unpack()
        if isinstance(weight, QuantizedWeight):
            weight = weight.dequantize(torch.float32)
        yield name, weight.to(_DTYPE)


def _config_json(
    config: NetworkConfig, parts: TokenizerParts, eos_ids: list[int]
) -> dict[str, Any]:
    values = {
        "architectures": [_CLASSES[config.architecture]],
        "model_type": config.architecture,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_eps,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": parts.bos_token_id,
        "eos_token_id": eos_ids if len(eos_ids) > 1 else next(iter(eos_ids), None),
        "torch_dtype": str(_DTYPE).removeprefix("torch."),
    }
    if (scaling := config.rope_scaling) is not None:
        values["max_position_embeddings"] = scaling.original_max_position
        values["rope_scaling"] = {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return values


def write_tokenizer(parts: TokenizerParts, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json with the chat template."""
    pipeline = parts.pipeline
    if parts.spelling is Spelling.BYTE_LEVEL:
        pipeline.decoder = decoders.ByteLevel()
    else:
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        if parts.strips_leading_space:
            steps.append(decoders.Strip(" ", 1, 0))
        pipeline.decoder = decoders.Sequence(steps)
    pipeline.add_tokens([token for _, token in sorted(parts.added_tokens.items())])
    if parts.prefix_ids or parts.suffix_ids:
        names = {i: str(pipeline.id_to_token(i)) for i in (*parts.prefix_ids, *parts.suffix_ids)}
        prefix = [names[i] for i in parts.prefix_ids]
        suffix = [names[i] for i in parts.suffix_ids]
        pipeline.post_processor = processors.TemplateProcessing(
            single=[*prefix, "$A", *suffix],
            pair=[*prefix, "$A", *suffix, *prefix, "$B", *suffix],
            special_tokens=[(name, i) for i, name in names.items()],
        )
    pipeline.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        **parts.named_tokens,
    }
    if parts.chat_template is not None:
        settings["chat_template"] = parts.chat_template
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
