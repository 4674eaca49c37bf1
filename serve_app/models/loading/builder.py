"""Builds a LlamaNetwork from a WeightSource, weight by weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from serve_app.core.errors import ConfigError
from serve_app.models.config import NetworkConfig
from serve_app.models.head import OutputHead, make_dense_head
from serve_app.models.kernels._triton import has_kernel
from serve_app.models.layers import RMSNorm
from serve_app.models.linear import (
    Linear,
    LinearPolicy,
    Weight,
    make_linear,
    make_packed_head,
)
from serve_app.models.llama import DecoderLayer, LlamaNetwork
from serve_app.models.loading.source import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    WeightSource,
    check_shape,
    expected_shapes,
)
from serve_app.models.packed import PackedRows
from serve_app.models.quantized import GROUP_SIZE, QuantizedWeight, quantize
from serve_app.models.rope import rotary_table
from serve_app.models.token_embedding import DenseEmbedding, PackedEmbedding, TokenEmbedding

WeightFormat = Literal["auto", "dense", "int4", "int8"]


class NetworkBuilder:
    """Reads weights in the order of the layers and lays them out for the kernels.

    After `build`, `weights_bytes` counts all copies in memory, and `weight_format` tells how the
    decoder's matrices are held: dense, int4 or int8.
    """

    def __init__(
        self,
        config: NetworkConfig,
        source: WeightSource,
        policy: LinearPolicy,
        weight_format: WeightFormat,
        progress: Callable[[int, int], None] | None,
        group_size: int = GROUP_SIZE,
    ) -> None:
        self.weights_bytes = 0
        self.products: list[Linear | OutputHead] = []
        self.weight_format = "dense"
        self._config = config
        self._source = source
        self._policy = policy
        self._bits = {"int4": 4, "int8": 8}.get(weight_format)
        self._progress = progress
        self._group_size = group_size
        self._shapes = expected_shapes(config)
        self._read_bytes = 0

    def build(self, frequencies: torch.Tensor, rotary_factor: float) -> LlamaNetwork:
        """Read everything; `frequencies` is float32 [head_dim / 2]."""
        policy = self._policy
        embedding, head = self._embedding_and_head()
        layers = [self._layer(index) for index in range(self._config.num_layers)]
        cos, sin = rotary_table(frequencies, rotary_factor, self._config.max_position)
        cos, sin = cos.to(policy.device), sin.to(policy.device)
        if not has_kernel("rope", cos):  # the kernel rotates in float32
            cos, sin = cos.to(policy.dtype), sin.to(policy.dtype)
        return self._network_class()(
            self._config,
            embedding,
            layers,
            self._norm(FINAL_NORM),
            head,
            (cos, sin),
            policy.batch_invariant,
        )

    def _network_class(self) -> type[LlamaNetwork]:
        return LlamaNetwork

    def _embedding_and_head(self) -> tuple[TokenEmbedding, OutputHead]:
        """Both as the file packs them where this machine can, else dense."""
        is_tied = self._config.tie_embeddings
        rows = self._read_packed(EMBEDDING)
        head_weight = _unpacked(rows) if is_tied else self._read(HEAD)
        packed_head = make_packed_head(head_weight, self._policy)
        if packed_head is None:
            weight = head_weight if is_tied else _unpacked(rows)
            return self._dense_embedding_and_head(weight, head_weight)
        embedding: TokenEmbedding
        if isinstance(rows, PackedRows):
            embedding = PackedEmbedding(rows, self._policy.dtype)
        else:
            embedding = DenseEmbedding(_dense(rows, self._policy.device, self._policy.dtype))
        head = OutputHead(packed_head)
        self.weights_bytes += embedding.nbytes + head.nbytes
        self.products.append(head)
        return embedding, head

    def _dense_embedding_and_head(
        self, weight: Weight, head_weight: Weight
    ) -> tuple[TokenEmbedding, OutputHead]:
        """The embedding in the activations' type, sharing memory with a tied dense head."""
        policy = self._policy
        dense = _dense(weight, policy.device, policy.dense_dtype)
        embedding = dense.to(policy.dtype)
        self.weights_bytes += embedding.nbytes
        if not self._config.tie_embeddings:
            dense = _dense(head_weight, policy.device, policy.dense_dtype)
        head = make_dense_head(head_weight, dense, policy)
        is_counted = self._config.tie_embeddings and embedding is dense
        if is_counted and head.shares_weight:
            self.weights_bytes -= dense.nbytes
        elif not is_counted and not head.shares_weight:
            self.weights_bytes += dense.nbytes
        self.weights_bytes += head.nbytes
        self.products.append(head)
        return DenseEmbedding(embedding), head

    def _layer(self, index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}."
        attention = prefix + "self_attn."
        has_norms = self._config.qk_norm
        layer = DecoderLayer(
            input_norm=self._norm(prefix + "input_layernorm.weight"),
            qkv=self._linear([attention + name for name in ("q_proj", "k_proj", "v_proj")]),
            output=self._linear([attention + "o_proj"]),
            mlp_norm=self._norm(prefix + "post_attention_layernorm.weight"),
            gate_up=self._linear([prefix + "mlp.gate_proj", prefix + "mlp.up_proj"]),
            down=self._linear([prefix + "mlp.down_proj"]),
            query_norm=self._norm(attention + "q_norm.weight") if has_norms else None,
            key_norm=self._norm(attention + "k_norm.weight") if has_norms else None,
        )
        self.weight_format = layer.gate_up.weight_format
        return layer

    def _linear(self, names: Sequence[str]) -> Linear:
        weights = [self._matrix(name + ".weight") for name in names]
        biases = [
            self._vector(name + ".bias") if name + ".bias" in self._shapes else None
            for name in names
        ]
        return self._made(weights, biases)

    def _made(
        self, weights: Sequence[Weight], biases: Sequence[torch.Tensor | None] | None = None
    ) -> Linear:
        linear = make_linear(weights, biases or [None] * len(weights), self._policy)
        self.weights_bytes += linear.nbytes
        self.products.append(linear)
        return linear

    def _matrix(self, name: str) -> Weight:
        """A decoder matrix, quantised on the way where the config asks for fewer bits."""
        weight = self._read(name)
        if self._bits is None or (
            isinstance(weight, QuantizedWeight) and weight.bits == self._bits
        ):
            return weight
        if isinstance(weight, QuantizedWeight):
            if weight.bits < self._bits:
                raise ConfigError(
                    f"engine.weight_format: int{self._bits} is wider than the {weight.bits} bits"
                    f" of {self._source.file_name}; set engine.weight_format: auto",
                    param="engine.weight_format",
                )
            weight = weight.dequantize(torch.float32)
        if weight.shape[1] % self._group_size:
            return weight
        return quantize(weight, self._bits, self._group_size)

    def _vector(self, name: str) -> torch.Tensor:
        weight = self._read(name)
        return weight.dequantize(torch.float32) if isinstance(weight, QuantizedWeight) else weight

    def _norm(self, name: str, dtype: torch.dtype | None = None) -> RMSNorm:
        """`dtype` is that of what the layer yields, if it isn't the activations'."""
        # A clone: a view of the file would keep its whole mapping alive.
        weight = self._vector(name).to(self._policy.device, self._policy.dtype, copy=True)
        self.weights_bytes += weight.nbytes
        return RMSNorm(weight, self._config.rms_eps, dtype)

    def _read(self, name: str) -> Weight:
        return _unpacked(self._read_packed(name))

    def _read_packed(self, name: str) -> Weight | PackedRows:
        weight = self._source.read(name)
        check_shape(self._source, name, tuple(weight.shape), self._shapes[name])
        self._read_bytes += self._source.nbytes(name)
        if self._progress is not None:
            self._progress(self._read_bytes, self._source.total_bytes)
        return weight


def _unpacked(weight: Weight | PackedRows) -> Weight:
    return weight.unpack() if isinstance(weight, PackedRows) else weight


def _dense(weight: Weight, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(weight, QuantizedWeight):
        return weight.dequantize(dtype).to(device)
    return weight.to(device, dtype)
