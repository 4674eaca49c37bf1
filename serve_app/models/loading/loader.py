"""load_model: a model file or folder into a network that is ready to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from serve_app.core.errors import ConfigError
from serve_app.hardware.cpu import read_cpu_info
from serve_app.hardware.memory import DENSE_COPY_SHARE, available_memory_bytes
from serve_app.models.config import (
    NetworkConfig,
    config_from_gguf,
    load_hugging_face_config,
    read_json,
)
from serve_app.models.gguf import GGUFFile
from serve_app.models.interface import LoadedModel
from serve_app.models.linear import LinearPolicy
from serve_app.models.loading.builder import NetworkBuilder, WeightFormat
from serve_app.models.loading.gguf_source import GGUFSource
from serve_app.models.loading.safetensors_source import SafetensorsSource
from serve_app.models.loading.source import WeightSource, check_names
from serve_app.models.rope import inverse_frequencies

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
Progress = Callable[[int, int], None]
_END_TOKENS = ("<|im_end|>", "<|eot_id|>")
_CONTROL_TOKEN = 3


def load_model(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: DTypeName = "auto",
    weight_format: WeightFormat = "auto",
    batch_invariant: bool = False,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a .gguf file or a Hugging Face folder with safetensors.

    `dtype` is that of activations and KV cache; `auto` is bfloat16 where the device is fast at it,
    else float32. `weight_format` `auto` keeps 4- and 8-bit weights packed, except where float32 is
    asked for by name: that is the reference. `progress` gets bytes read and bytes in all.

    Raises UnsupportedArchitectureError for a network that is not known here, ConfigError, one line,
    for files that are missing, damaged, incomplete, or too much for the memory.
    """
    target = torch.device(device)
    if path.is_dir():
        config = load_hugging_face_config(path)
        source: WeightSource = SafetensorsSource(path)
        frequencies, factor = inverse_frequencies(config)
        eos_token_ids = hugging_face_eos(path)
    else:
        file = GGUFFile(path)
        config = _gguf_config(file)
        source = gguf_source = GGUFSource(file, config)
        frequencies, factor = inverse_frequencies(config)
        if (factors := gguf_source.rope_factors()) is not None:
            frequencies = frequencies / factors
        eos_token_ids = gguf_eos(file.metadata)
    check_names(source, config)
    policy = make_policy(config, target, dtype, weight_format, batch_invariant)
    builder = NetworkBuilder(config, source, policy, weight_format, progress)
    try:
        with torch.no_grad():
            network = builder.build(frequencies, factor)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"model.path: {path.name} does not fit the memory of {target}; take a smaller model,"
            " engine.weight_format: int4, or a card with more memory",
            param="model.path",
        ) from None
    return LoadedModel(
        network=network,
        name=path.name if path.is_dir() else path.stem,
        architecture=config.architecture,
        dtype=policy.dtype,
        weights_bytes=builder.weights_bytes,
        weight_format=builder.weight_format,
        eos_token_ids=eos_token_ids,
    )


def resolve_dtype(device: torch.device, dtype: DTypeName) -> torch.dtype:
    """The type of activations on `device`; `auto`: bfloat16 where it is fast, else float32."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            dtype
        ]
    if device.type == "cpu":
        return torch.bfloat16 if read_cpu_info().has_fast_bfloat16 else torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def hugging_face_eos(folder: Path) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json's if stated there, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        if not (folder / name).is_file():
            continue
        value = read_json(folder / name).get("eos_token_id")
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list) and value:
            return tuple(int(token_id) for token_id in value)
    return ()


def gguf_eos(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence and end-of-turn ids that the file names, and the well-known turn ends."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    types = metadata.get("tokenizer.ggml.token_type")
    for text in _END_TOKENS:
        token_id = tokens.index(text) if text in tokens else None
        if token_id is not None and types is not None and types[token_id] == _CONTROL_TOKEN:
            ids.append(token_id)
    return tuple(dict.fromkeys(token_id for token_id in ids if isinstance(token_id, int)))


def _gguf_config(file: GGUFFile) -> NetworkConfig:
    embedding = file.tensors.get("token_embd.weight")
    vocab_size = embedding.shape[0] if embedding else 1
    return config_from_gguf(file.metadata, vocab_size, frozenset(file.tensors))


def make_policy(
    config: NetworkConfig,
    device: torch.device,
    dtype: DTypeName,
    weight_format: WeightFormat,
    batch_invariant: bool,
) -> LinearPolicy:
    """How linear layers of this network are made on `device`; arguments as of `load_model`."""
    compute = resolve_dtype(device, dtype)
    is_slow = device.type == "cpu" and not read_cpu_info().has_fast_bfloat16
    dense_dtype = torch.float32 if is_slow and compute is not torch.float16 else compute
    is_reference = weight_format == "auto" and dtype == "float32"
    dense_bytes = _num_linear_weights(config) * dense_dtype.itemsize
    return LinearPolicy(
        device=device,
        dtype=compute,
        dense_dtype=dense_dtype,
        keeps_packed=weight_format != "dense" and not is_reference,
        keeps_dense=dense_bytes <= DENSE_COPY_SHARE * _free_bytes(device),
        batch_invariant=batch_invariant,
    )


def _num_linear_weights(config: NetworkConfig) -> int:
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return config.num_layers * config.hidden_size * (heads + 3 * config.intermediate_size)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return available_memory_bytes()
    module = getattr(torch, device.type)
    return int(module.mem_get_info(device)[0])
