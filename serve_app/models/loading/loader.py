"""load_model: a model file or folder into a network that is ready to run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from serve_app.core.errors import ConfigError
from serve_app.hardware.cpu import read_cpu_info
from serve_app.hardware.memory import DENSE_COPY_SHARE, available_memory_bytes
from serve_app.models.config import (
    NetworkConfig,
    load_hugging_face_config,
    read_json,
)
from serve_app.models.gguf import GGUFFile
from serve_app.models.gguf_config import config_from_gguf
from serve_app.models.interface import LoadedModel
from serve_app.models.linear import LinearPolicy
from serve_app.models.loading.builder import NetworkBuilder, WeightFormat
from serve_app.models.loading.gguf_source import GGUFSource
from serve_app.models.loading.heap import trim_heap
from serve_app.models.loading.quantization.table import open_folder
from serve_app.models.loading.read_ahead import Progress, reading_ahead
from serve_app.models.loading.source import (
    FileSource,
    WeightSource,
    check_names,
    expected_shapes,
)
from serve_app.models.loading.sparse_builder import SparseBuilder
from serve_app.models.parallel import Shard, ShardedSource, shard_config
from serve_app.models.quantized import GROUP_SIZE
from serve_app.models.rope import inverse_frequencies

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
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
    shard: Shard | None = None,
    has_head: bool = True,
) -> LoadedModel:
    """Load a .gguf file or a Hugging Face folder with safetensors.

    `dtype` is that of activations and KV cache; `auto` is bfloat16 where the device is fast at it,
    else float32. `weight_format` `auto` keeps 4- and 8-bit weights packed, except where float32 is
    asked for by name: that is the reference. `progress` gets bytes read and bytes in all. With
    `shard` the network holds that part alone and needs `reduce_over_ranks`. Without `has_head` the
    files need no output layer, and one that they have stays unread: hidden states are wanted.

    Raises UnsupportedArchitectureError for a network that is not known here, ConfigError, one line,
    for files that are missing, damaged, incomplete, or too much for the memory.
    """
    target = torch.device(device)

    def policy_of(config: NetworkConfig) -> LinearPolicy:
        return make_policy(config, target, dtype, weight_format, batch_invariant)

    files = _open_folder(path, policy_of, has_head) if path.is_dir() else _open_gguf(path)
    config, source = files.config, files.source
    check_names(source, config)
    spans = [span for name in expected_shapes(config) for span in source.spans(name)]
    if shard is not None:
        if shard.rank:
            spans = []  # rank 0 reads ahead for all
        config, source = shard_config(config, shard), ShardedSource(source, shard)
    policy = policy_of(config)
    try:
        with torch.no_grad(), reading_ahead(spans, progress) as told:
            builder = make_builder(config, source, policy, weight_format, told)
            network = builder.build(*files.rotary)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"model.path: {path.name} does not fit the memory of {target}; take a smaller model,"
            " engine.weight_format: int4, or a card with more memory",
            param="model.path",
        ) from None
    files.release()
    if target.type == "cpu":
        trim_heap()
    return LoadedModel(
        network=network,
        name=path.name if path.is_dir() else path.stem,
        architecture=config.architecture,
        dtype=policy.dtype,
        weights_bytes=builder.weights_bytes,
        weight_format=builder.weight_format,
        eos_token_ids=files.eos_token_ids,
        products=tuple(builder.products),
    )


@dataclass(frozen=True, slots=True)
class _ModelFiles:
    """What a checkpoint holds. `rotary`: frequencies [rope_dim / 2] and their factor.

    `release` lets go of what reading has kept in memory.
    """

    config: NetworkConfig
    source: FileSource
    rotary: tuple[torch.Tensor, float]
    eos_token_ids: tuple[int, ...]
    release: Callable[[], None] = lambda: None


def _open_folder(
    path: Path, policy_of: Callable[[NetworkConfig], LinearPolicy], has_head: bool
) -> _ModelFiles:
    config = load_hugging_face_config(path)
    if not has_head:
        config = replace(config, tie_embeddings=True)
    policy = policy_of(config)
    source = open_folder(path, policy.device, policy.dense_dtype, expected_shapes(config))
    return _ModelFiles(config, source, inverse_frequencies(config), hugging_face_eos(path))


def _open_gguf(path: Path) -> _ModelFiles:
    file = GGUFFile(path)
    config = _gguf_config(file)
    source = GGUFSource(file, config)
    frequencies, factor = inverse_frequencies(config)
    if (factors := source.rope_factors()) is not None:
        frequencies = frequencies / factors
    return _ModelFiles(
        config, source, (frequencies, factor), gguf_eos(file.metadata), source.release
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


def make_builder(
    config: NetworkConfig,
    source: WeightSource,
    policy: LinearPolicy,
    weight_format: WeightFormat,
    progress: Progress | None = None,
    group_size: int = GROUP_SIZE,
) -> NetworkBuilder:
    """The builder for this kind of network; `group_size` is that of weights rounded while read."""
    is_sparse = config.latent is not None or config.mixture is not None
    kind = SparseBuilder if is_sparse else NetworkBuilder
    return kind(config, source, policy, weight_format, progress, group_size)


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
    dense_bytes = num_linear_weights(config) * dense_dtype.itemsize
    return LinearPolicy(
        device=device,
        dtype=compute,
        dense_dtype=dense_dtype,
        keeps_packed=weight_format != "dense" and not is_reference,
        keeps_dense=dense_bytes <= DENSE_COPY_SHARE * _free_bytes(device),
        batch_invariant=batch_invariant,
    )


def num_linear_weights(config: NetworkConfig) -> int:
    """Weights of all matrices of the layers, experts included."""
    return sum(
        math.prod(shape)
        for name, shape in expected_shapes(config).items()
        if len(shape) == 2 and name.startswith("model.layers.")
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return available_memory_bytes()
    module = getattr(torch, device.type)
    return int(module.mem_get_info(device)[0])
