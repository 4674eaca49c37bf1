"""compressed-tensors: integers packed or plain, and FP8, as llm-compressor writes them.

Format: https://github.com/vllm-project/compressed-tensors. "pack-quantized": `weight_packed` int32
[N, K * bits / 32], packed along K, each code shifted by 2^(bits-1); `weight_scale` [N, G];
`weight_zero_point`, where asymmetric, int32 [N * bits / 32, G], packed along N with the same shift,
or int8 [N, G]; `weight_shape` int64 [2]; `weight_g_idx` int32 [K] where activation order moved
columns. "int-quantized": `weight` int8 [N, K]. "float-quantized": `weight` FP8 [N, K].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from serve_app.models.loading.quantization.fp8 import scale_blocks
from serve_app.models.loading.quantization.groups import (
    bits_of,
    from_groups,
    from_indexed_groups,
    group_size_of,
    unpack_words,
)
from serve_app.models.loading.quantization.layout import (
    Layout,
    LayoutError,
    QuantizationFormat,
    unsupported,
)
from serve_app.models.quantized import QuantizedWeight

_KNOWN = "pack-quantized, int-quantized and float-quantized"
_PLAIN = ("int-quantized", "float-quantized", "naive-quantized")


class CompressedTensors:
    """Format "pack-quantized"."""

    layout = Layout(
        ".weight_packed",
        (".weight_scale", ".weight_shape"),
        (".weight_zero_point", ".weight_g_idx"),
    )

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._group_size = _agreed(values, "group_size")

    def unpack(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> QuantizedWeight | torch.Tensor:
        """Groups of 32; dense where activation order put columns into groups out of order."""
        words, scales = parts[".weight_packed"], parts[".weight_scale"]
        shape = parts[".weight_shape"].tolist()
        if words.dim() != 2 or len(shape) != 2 or words.shape[0] != shape[0]:
            raise LayoutError(
                f"weight_packed {list(words.shape)} does not fit weight_shape {shape}"
            )
        num_rows, num_columns = shape
        scales = _per_row(scales, num_rows)
        bits = bits_of(words.shape[1], num_columns)
        codes = unpack_words(words, bits)[:, :num_columns]
        zeros = torch.full_like(scales, 1 << bits - 1, dtype=torch.float32)
        if (stored := parts.get(".weight_zero_point")) is not None:
            zeros = _zeros(stored, bits, num_rows, scales)
        size = group_size_of(num_columns, scales.shape[1], self._group_size)
        index = parts.get(".weight_g_idx")
        if index is not None and not torch.equal(
            index, torch.arange(num_columns).to(index) // size
        ):
            return from_indexed_groups(codes, scales, zeros, index, dtype)
        return from_groups(codes, scales, zeros, bits, size, dtype)


class PlainTensors:
    """Formats "int-quantized" and "float-quantized": one code per byte."""

    layout = Layout(".weight_scale", (".weight",), (".weight_zero_point",))

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._bits = 4 if _agreed(values, "num_bits") == 4 else 8
        self._group_size = _agreed(values, "group_size")
        block = _agreed(values, "block_structure")
        self._block = None if block is None else (int(block[0]), int(block[1]))

    def unpack(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> QuantizedWeight | torch.Tensor:
        """Groups of 32 from integers, dense from FP8."""
        weight, scales = parts[".weight"], parts[".weight_scale"]
        if weight.is_floating_point():
            return scale_blocks(weight, scales, self._block, dtype)
        if weight.dtype is not torch.int8 or weight.dim() != 2:
            raise LayoutError(f"its weight is {weight.dtype} {list(weight.shape)}")
        half = 1 << self._bits - 1
        scales = _per_row(scales, weight.shape[0])
        zeros = torch.full_like(scales, half, dtype=torch.float32)
        if (stored := parts.get(".weight_zero_point")) is not None:
            zeros = zeros + _per_row(stored, weight.shape[0])
        codes = weight.view(torch.uint8) + half  # wraps round from signed to unsigned
        size = group_size_of(weight.shape[1], scales.shape[1], self._group_size)
        return from_groups(codes, scales, zeros, self._bits, size, dtype)


def compressed_tensors(values: Mapping[str, Any]) -> QuantizationFormat:
    """quant_method "compressed-tensors": by `format`, of the checkpoint or of its one group."""
    groups = values.get("config_groups") or {}
    formats = {str(values.get("format"))} - {"None", "mixed-precision"}
    formats |= {str(group["format"]) for group in groups.values() if group.get("format")}
    if values.get("sparsity_config"):
        raise unsupported("sparse compressed-tensors", _KNOWN)
    if len(formats) != 1 or not formats <= {"pack-quantized", *_PLAIN}:
        raise unsupported(f"compressed-tensors of format {', '.join(sorted(formats))}", _KNOWN)
    for group in groups.values():
        activations = group.get("input_activations") or {}
        if activations and not activations.get("dynamic"):
            raise unsupported("static activation scales", "weight-only and dynamic activations")
    if formats == {"pack-quantized"}:
        return CompressedTensors(values)
    return PlainTensors(values)


def _agreed(values: Mapping[str, Any], name: str) -> Any:
    """An argument of the weights, where all groups of layers have the same; else None."""
    groups = (values.get("config_groups") or {}).values()
    given = [(group.get("weights") or {}).get(name) for group in groups]
    return given[0] if given and all(each == given[0] for each in given) else None


def _zeros(stored: torch.Tensor, bits: int, num_rows: int, scales: torch.Tensor) -> torch.Tensor:
    """Zeros of the unsigned codes, [N, G], in the scales' place."""
    if stored.dtype is torch.int32:
        return unpack_words(stored.T, bits)[:, :num_rows].T
    return _per_row(stored, num_rows).float() + (1 << bits - 1)


def _per_row(values: torch.Tensor, num_rows: int) -> torch.Tensor:
    """One value for all, or [N] or [N, G], as [N, G]."""
    if values.numel() == 1:
        return values.reshape(1, 1).expand(num_rows, 1)
    return values.reshape(num_rows, -1) if values.dim() < 2 else values
