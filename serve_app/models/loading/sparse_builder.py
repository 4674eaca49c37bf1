"""Builds networks with latent attention or experts from a WeightSource, weight by weight."""

from __future__ import annotations

from dataclasses import replace

import torch

from serve_app.models.deepseek import DeepseekNetwork, LatentLayer, SparseLayer
from serve_app.models.kernels.grouped import GroupedWeight, can_pack, pack_rows
from serve_app.models.layers import RMSNorm
from serve_app.models.linear import Linear, Weight, make_linear
from serve_app.models.llama import LlamaNetwork
from serve_app.models.loading.builder import NetworkBuilder
from serve_app.models.loading.sparse_shapes import shared_prefix
from serve_app.models.matmul import Kernel, row_invariant
from serve_app.models.mla import LatentAttention, PerHead
from serve_app.models.moe import (
    Experts,
    FeedForward,
    GroupedExperts,
    ListedExperts,
    MixtureOfExperts,
    Router,
)
from serve_app.models.quantized import QuantizedWeight
from serve_app.models.rope import attention_scale

LATENT_NORM_EPS = 1e-6
"""DeepSeek's norms inside attention keep this, whatever `rms_norm_eps` says."""


class SparseBuilder(NetworkBuilder):
    """A `NetworkBuilder` for configs with `latent` or `mixture`."""

    def _network_class(self) -> type[LlamaNetwork]:
        return LlamaNetwork if self._config.latent is None else DeepseekNetwork

    def _layer(self, index: int) -> SparseLayer | LatentLayer:
        prefix = f"model.layers.{index}."
        attention = prefix + "self_attn."
        input_norm = self._norm(prefix + "input_layernorm.weight")
        if self._config.latent is not None:
            return LatentLayer(
                input_norm,
                self._latent_attention(attention),
                self._mlp_norm(index),
                self._mlp(index),
            )
        has_norms = self._config.qk_norm
        return SparseLayer(
            input_norm=input_norm,
            qkv=self._linear([attention + name for name in ("q_proj", "k_proj", "v_proj")]),
            output=self._linear([attention + "o_proj"]),
            mlp_norm=self._mlp_norm(index),
            mlp=self._mlp(index),
            query_norm=self._norm(attention + "q_norm.weight") if has_norms else None,
            key_norm=self._norm(attention + "k_norm.weight") if has_norms else None,
        )

    def _latent_attention(self, prefix: str) -> LatentAttention:
        config, shape = self._config, self._config.latent
        assert shape is not None, "the layer has latent attention"
        is_low_rank = shape.q_lora_rank is not None
        kv_down = self._matrix(prefix + "kv_a_proj_with_mqa.weight")
        kv_down = self._half_split(kv_down, 1, shape.kv_lora_rank)
        query_name = "q_b_proj" if is_low_rank else "q_proj"
        query = self._matrix(f"{prefix}{query_name}.weight")
        query = self._half_split(query, config.num_heads, shape.nope_head_dim)
        first = self._matrix(prefix + "q_a_proj.weight") if is_low_rank else query
        key_up, value_up = self._split_up(prefix + "kv_b_proj.weight")
        return LatentAttention(
            shape=shape,
            num_heads=config.num_heads,
            scale=attention_scale(config),
            down=self._made([first, kv_down]),
            query_norm=self._latent_norm(prefix + "q_a_layernorm.weight") if is_low_rank else None,
            query_up=self._made([query]) if is_low_rank else None,
            latent_norm=self._latent_norm(prefix + "kv_a_layernorm.weight"),
            absorb_key=self._per_head(key_up),
            absorb_value=self._per_head(value_up),
            key_up=key_up,
            value_up=value_up,
            output=self._linear([prefix + "o_proj"]),
        )

    def _half_split(self, weight: Weight, num_heads: int, nope_dim: int) -> Weight:
        """Rows of each head's rotary part, from neighbouring pairs to two halves.

        Queries and keys move alike, so their products stay.
        """
        shape = self._config.latent
        assert shape is not None, "the layer has latent attention"
        if not shape.is_interleaved:
            return weight
        rows = torch.arange(weight.shape[0]).view(num_heads, -1)
        pairs = rows[:, nope_dim:].reshape(num_heads, -1, 2).transpose(1, 2).flatten(1)
        return _select_rows(weight, torch.cat((rows[:, :nope_dim], pairs), dim=1).flatten())

    def _split_up(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """kv_b_proj → key_up [H, N, R] and value_up [H, R, V], dense: heads multiply apart."""
        shape, policy = self._config.latent, self._policy
        assert shape is not None, "the layer has latent attention"
        weight = self._dense_matrix(name).to(policy.device, policy.dense_dtype)
        heads = weight.view(self._config.num_heads, -1, shape.kv_lora_rank)
        key, value = heads.split((shape.nope_head_dim, shape.value_head_dim), dim=1)
        key_up = key.contiguous()
        value_up = value.transpose(1, 2).contiguous()
        self.weights_bytes += key_up.nbytes + value_up.nbytes
        return key_up, value_up

    def _per_head(self, weight: torch.Tensor) -> Linear:
        """The product by head, which is one kernel whatever the rows."""
        kernel = PerHead(weight)
        policy = self._policy
        invariant: Kernel = kernel
        if policy.batch_invariant:
            num_columns = weight.shape[0] * weight.shape[1]
            invariant = row_invariant(kernel, num_columns, policy.device, policy.dtype)
        return Linear(kernel, kernel, 0, invariant, "dense")

    def _latent_norm(self, name: str) -> RMSNorm:
        return RMSNorm(self._norm(name).weight, LATENT_NORM_EPS)

    def _mlp_norm(self, index: int) -> RMSNorm:
        """A mixture takes its rows in float32."""
        mixture = self._config.mixture
        is_sparse = mixture is not None and mixture.is_sparse[index]
        name = f"model.layers.{index}.post_attention_layernorm.weight"
        return self._norm(name, torch.float32 if is_sparse else None)

    def _mlp(self, index: int) -> FeedForward | MixtureOfExperts:
        config, prefix = self._config, f"model.layers.{index}."
        mixture = config.mixture
        if mixture is None or not mixture.is_sparse[index]:
            dense = self._feed_forward(prefix + "mlp.")
            self.weight_format = dense.gate_up.weight_format
            return dense
        bias = None
        if mixture.has_correction_bias:
            name = prefix + "mlp.gate.e_score_correction_bias"
            bias = self._vector(name).to(self._policy.device, torch.float32, copy=True)
        router = Router(self._wide_linear(prefix + "mlp.gate.weight"), bias, mixture)
        has_gate = mixture.has_shared_gate
        return MixtureOfExperts(
            dtype=self._policy.dtype,
            router=router,
            experts=self._experts(prefix + "mlp.experts.", mixture.num_experts),
            shared=self._feed_forward(prefix + shared_prefix(config))
            if mixture.shared_size
            else None,
            shared_gate=self._wide_linear(prefix + "mlp.shared_expert_gate.weight")
            if has_gate
            else None,
        )

    def _feed_forward(self, prefix: str) -> FeedForward:
        gate_up = self._linear([prefix + "gate_proj", prefix + "up_proj"])
        return FeedForward(gate_up, self._linear([prefix + "down_proj"]))

    def _experts(self, prefix: str, num_experts: int) -> Experts:
        if self._policy.device.type == "cpu":
            listed = [self._feed_forward(f"{prefix}{expert}.") for expert in range(num_experts)]
            self.weight_format = listed[0].gate_up.weight_format
            return ListedExperts(listed)
        gate_up = self._stack(prefix, num_experts, ("gate_proj", "up_proj"))
        down = self._stack(prefix, num_experts, ("down_proj",))
        self.weight_format = "dense" if gate_up.scales is None else "int4"
        return GroupedExperts(gate_up, down)

    def _stack(self, prefix: str, num_experts: int, names: tuple[str, ...]) -> GroupedWeight:
        """All experts' matrices, those of `names` one below the other, straight on the device."""
        columns = self._shapes[f"{prefix}0.{names[0]}.weight"][1]
        size = sum(self._shapes[f"{prefix}0.{name}.weight"][0] for name in names)
        stacked: GroupedWeight | None = None
        for expert in range(num_experts):
            parts = [self._matrix(f"{prefix}{expert}.{name}.weight") for name in names]
            if stacked is None:
                stacked = self._empty_stack(parts, (num_experts, size, columns))
            self._fill(stacked, expert, parts)
        assert stacked is not None, "a mixture has experts"
        self.weights_bytes += stacked.nbytes
        return stacked

    def _empty_stack(self, parts: list[Weight], shape: tuple[int, int, int]) -> GroupedWeight:
        device = self._policy.device
        num_experts, size, columns = shape
        is_packed = self._policy.keeps_packed and all(
            isinstance(part, QuantizedWeight) and part.bits == 4 for part in parts
        )
        if not is_packed or not can_pack(columns):
            return GroupedWeight(torch.empty(shape, dtype=self._policy.dtype, device=device))
        groups = (num_experts, size, columns // 32)
        return GroupedWeight(
            torch.empty(num_experts, size, columns // 2, dtype=torch.uint8, device=device),
            torch.empty(groups, dtype=torch.float16, device=device),
            torch.empty(groups, dtype=torch.float16, device=device),
        )

    def _fill(self, stacked: GroupedWeight, expert: int, parts: list[Weight]) -> None:
        start = 0
        for part in parts:
            rows = slice(start, start + part.shape[0])
            if stacked.scales is None or stacked.offsets is None:
                if isinstance(part, QuantizedWeight):
                    part = part.dequantize(self._policy.dtype)
                stacked.values[expert, rows] = part
            else:
                assert isinstance(part, QuantizedWeight), "experts of a layer are packed alike"
                values, scales, offsets = pack_rows(part)
                stacked.values[expert, rows] = values
                stacked.scales[expert, rows] = scales
                stacked.offsets[expert, rows] = offsets
            start = rows.stop

    def _wide_linear(self, name: str) -> Linear:
        """A product in float32: a router's choice turns on small differences."""
        policy = replace(
            self._policy, dtype=torch.float32, dense_dtype=torch.float32, keeps_packed=False
        )
        linear = make_linear([self._dense_matrix(name)], [None], policy)
        self.weights_bytes += linear.nbytes
        return linear

    def _dense_matrix(self, name: str) -> torch.Tensor:
        """A matrix that no packed kernel serves: as the checkpoint has it, dense."""
        weight = self._read(name)
        return weight.dequantize(torch.float32) if isinstance(weight, QuantizedWeight) else weight


def _select_rows(weight: Weight, rows: torch.Tensor) -> Weight:
    if not isinstance(weight, QuantizedWeight):
        return weight[rows.to(weight.device)]
    rows = rows.to(weight.codes.device)
    return replace(
        weight,
        codes=weight.codes[rows],
        scales=weight.scales[rows],
        offsets=weight.offsets[rows],
    )
