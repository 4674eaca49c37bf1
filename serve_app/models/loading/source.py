"""WeightSource: a checkpoint's weights under transformers' names, whatever the file format."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

import torch

from serve_app.core.errors import ConfigError
from serve_app.models.config import NetworkConfig
from serve_app.models.loading.read_ahead import Span
from serve_app.models.loading.sparse_shapes import (
    latent_attention_shapes,
    mixture_shapes,
    mlp_shapes,
)
from serve_app.models.packed import PackedRows
from serve_app.models.quantized import QuantizedWeight

_LOG = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


class WeightSource(Protocol):
    """Weights on disk. `total_bytes` counts what `read` will return in all."""

    file_name: str
    total_bytes: int

    def names(self) -> frozenset[str]:
        """All weights, by transformers' names."""
        ...

    def nbytes(self, name: str) -> int:
        """Bytes that `name` takes in the file."""
        ...

    def read(self, name: str) -> torch.Tensor | PackedRows | QuantizedWeight:
        """A view of the mapped file, on the CPU, in the file's own type.

        What a source makes itself (a quantized layer put together, a random weight) may lie on the
        device already, dense or in groups.
        """
        ...


class FileSource(WeightSource, Protocol):
    """A `WeightSource` over files."""

    def spans(self, name: str) -> tuple[Span, ...]:
        """Where the bytes of `name` lie."""
        ...


def expected_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Every weight that a network of this shape needs."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (vocab, hidden),
        FINAL_NORM: (hidden,),
    }
    if not config.tie_embeddings:
        shapes[HEAD] = (vocab, hidden)
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        shapes |= {prefix + name: shape for name, shape in _layer_shapes(config, index).items()}
    return shapes


def _layer_shapes(config: NetworkConfig, index: int) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    is_latent = config.latent is not None
    shapes |= latent_attention_shapes(config) if is_latent else _attention_shapes(config)
    if config.mixture is not None and config.mixture.is_sparse[index]:
        return shapes | mixture_shapes(config)
    shapes |= mlp_shapes("mlp.", hidden, inner)
    if config.mlp_bias:
        shapes |= {
            "mlp.gate_proj.bias": (inner,),
            "mlp.up_proj.bias": (inner,),
            "mlp.down_proj.bias": (hidden,),
        }
    return shapes


def _attention_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
    }
    if config.qkv_bias:
        shapes |= {
            f"self_attn.{name}_proj.bias": (size,)
            for name, size in (("q", query), ("k", key), ("v", key))
        }
    if config.output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = (config.head_dim,)
        shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def check_names(source: WeightSource, config: NetworkConfig) -> None:
    """Raise ConfigError, one line, where weights are missing or are none of this network's."""
    expected = set(expected_shapes(config))
    present = {name for name in source.names() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        present.discard(HEAD)
    if extra := _extra_names(present, config):
        _LOG.info("%s: skipped %s, for predicting further tokens", source.file_name, _some(extra))
        present -= extra
    if missing := expected - present:
        raise _mismatch(source, f"lacks {_some(missing)}", "copy or convert the model again")
    if unexpected := present - expected:
        fix = "it is no plain model of its architecture; try engine.kind: transformers"
        raise _mismatch(source, f"has {_some(unexpected)} that the network does not use", fix)


def _extra_names(names: Iterable[str], config: NetworkConfig) -> set[str]:
    """Weights of the layers after the last that predict further tokens (V3's MTP)."""
    after = range(config.num_layers, config.num_layers + config.num_extra_layers)
    prefixes = tuple(f"model.layers.{index}." for index in after)
    return {name for name in names if prefixes and name.startswith(prefixes)}


def check_shape(
    source: WeightSource, name: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Raise ConfigError where a weight's shape is not what the config says."""
    if tuple(shape) != expected:
        what = f"has {name} of shape {list(shape)}, where its config needs {list(expected)}"
        raise _mismatch(source, what, "copy or convert the model again")


def _mismatch(source: WeightSource, what: str, fix: str) -> ConfigError:
    return ConfigError(f"model.path: {source.file_name} {what}; {fix}", param="model.path")


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    shown = ", ".join(ordered[:3])
    return shown if len(ordered) <= 3 else f"{shown} and {len(ordered) - 3} more"
