"""FP8 weights with a scale per block of 128 x 128, as DeepSeek-V3 and R1 are published.

Format: https://github.com/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md: `weight`
float8_e4m3fn [N, K] and `weight_scale_inv` [ceil(N/128), ceil(K/128)], by which the weight is
multiplied despite its name; float32, or powers of two as float8_e8m0fnu (`scale_fmt: ue8m0`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from serve_app.models.loading.quantization.layout import Layout, LayoutError, unsupported

_ROWS_AT_ONCE = 4096
_E8M0_BIAS = 127


class BlockFP8:
    """quant_method "fp8"; the weights become dense, as no card of ours multiplies by FP8 blocks."""

    layout = Layout(".weight_scale_inv", (".weight",))

    def __init__(self, values: Mapping[str, Any]) -> None:
        if values.get("activation_scheme", "dynamic") != "dynamic":
            raise unsupported("FP8 with static activation scales", "activation_scheme: dynamic")
        if values.get("fmt", "e4m3") != "e4m3":
            raise unsupported(f"FP8 of fmt {values['fmt']!r}", "fmt: e4m3")
        if values.get("expert_dtype", "fp8") != "fp8":
            raise unsupported(f"experts of type {values['expert_dtype']!r}", "expert_dtype: fp8")
        size = values.get("weight_block_size")
        self._block = None if size is None else (int(size[0]), int(size[1]))

    def unpack(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Dense [N, K] in `dtype`."""
        return scale_blocks(parts[".weight"], parts[".weight_scale_inv"], self._block, dtype)


def scale_blocks(
    weight: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int] | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """FP8 [N, K] times one scale per block: dense in `dtype`, rounded once from float32.

    Without `block` the scales are one for all, or one per row. Raises LayoutError.
    """
    if weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2) or weight.dim() != 2:
        raise LayoutError(f"the FP8 weight is {weight.dtype} {list(weight.shape)}")
    num_rows, num_columns = weight.shape
    if scales.dtype is torch.uint8:  # exponents without a float type of their own
        scales = torch.exp2(scales.float() - _E8M0_BIAS)
    scales = scales.float()
    if block is None or scales.numel() == 1:
        block = (num_rows if scales.numel() == 1 else 1, num_columns)
        scales = scales.reshape(-1, 1)
    expected = (-(-num_rows // block[0]), -(-num_columns // block[1]))
    if tuple(scales.shape) != expected:
        raise LayoutError(f"it has scales {list(scales.shape)} where {list(expected)} are needed")
    columns = torch.arange(num_columns, device=weight.device) // block[1]
    dense = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        rows = torch.arange(start, min(start + _ROWS_AT_ONCE, num_rows), device=weight.device)
        factors = scales[rows // block[0]][:, columns]
        dense[start : start + _ROWS_AT_ONCE] = factors.mul_(
            weight[start : start + rows.numel()].float()
        )
    return dense
