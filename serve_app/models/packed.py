"""GGUF's quantised blocks, exactly as groups of 32 columns (or dense, where groups are smaller).

Block layouts: ggml-common.h of https://github.com/ggml-org/ggml. With d, m and the scales as
stored: Q4_0 (q - 8) · d, Q5_0 (q - 16) · d, Q8_0 q · d, Q4_1 and Q5_1 q · d + m, Q4_K and Q5_K
q · d · scale - dmin · min, Q6_K (q - 32) · d · scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from serve_app.models.gguf import BLOCK_LAYOUT, GGMLType
from serve_app.models.quantized import QuantizedWeight


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A matrix [N, K] as GGUF stores it. `data`: uint8 [N, bytes of a row], often a file's view."""

    ggml_type: GGMLType
    data: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        block, block_bytes = BLOCK_LAYOUT[self.ggml_type]
        return self.data.shape[0], self.data.shape[1] // block_bytes * block

    def select(self, rows: torch.Tensor) -> PackedRows:
        """Return the rows in the order of int64 `rows`, still packed."""
        return PackedRows(self.ggml_type, self.data[rows])

    def unpack(self) -> QuantizedWeight | torch.Tensor:
        """Return groups with one code per byte; float32 [N, K] for Q6_K, whose groups have 16."""
        _, block_bytes = BLOCK_LAYOUT[self.ggml_type]
        blocks = self.data.reshape(self.shape[0], -1, block_bytes)
        return _UNPACK[self.ggml_type](blocks)


def _legacy(blocks: torch.Tensor, bits: int, has_minimum: bool) -> QuantizedWeight:
    """Q4_0, Q4_1, Q5_0, Q5_1: d, perhaps m, perhaps 32 high bits, then 32 nibbles."""
    scales = _half(blocks, 0)
    start = 4 if has_minimum else 2
    offsets = _half(blocks, 2) if has_minimum else -(1 << (bits - 1)) * scales
    nibbles = blocks[..., start + 4 if bits == 5 else start :]
    codes = torch.cat((nibbles & 15, nibbles >> 4), dim=-1)
    if bits == 5:
        high = blocks[..., start : start + 4, None] >> torch.arange(8, dtype=torch.uint8) & 1
        codes |= high.flatten(-2) << 4
    return _weight(codes, bits, scales, offsets)


def _q8_0(blocks: torch.Tensor) -> QuantizedWeight:
    scales = _half(blocks, 0)
    return _weight(blocks[..., 2:], 8, scales, torch.zeros_like(scales))


def _k_quants(blocks: torch.Tensor, bits: int) -> QuantizedWeight:
    """Q4_K, Q5_K: d, dmin, eight 6-bit scales and minima in 12 bytes, high bits, nibbles."""
    low, middle, high = torch.unflatten(blocks[..., 4:16], -1, (3, 4)).unbind(-2)
    scales = torch.cat((low & 63, high & 15 | low >> 2 & 48), dim=-1)
    minima = torch.cat((middle & 63, high >> 4 | middle >> 2 & 48), dim=-1)
    nibbles = torch.unflatten(blocks[..., -128:], -1, (4, 32))
    codes = torch.stack((nibbles & 15, nibbles >> 4), dim=-2).flatten(-3, -2)
    if bits == 5:
        shifts = torch.arange(8, dtype=torch.uint8)[:, None]
        codes |= (blocks[..., None, 16:48] >> shifts & 1) << 4
    step = (_half(blocks, 0)[..., None] * scales).flatten(1)
    offset = (-_half(blocks, 2)[..., None] * minima).flatten(1)
    return _weight(codes, bits, step, offset)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low = torch.unflatten(blocks[..., :128], -1, (2, 1, 64))
    low = torch.cat((low & 15, low >> 4), dim=-2).flatten(-3)
    low = torch.unflatten(low, -1, (8, 32))
    high = torch.unflatten(blocks[..., 128:192], -1, (2, 1, 32))
    high = (high >> torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8) & 3).flatten(-3, -2)
    codes = (low | high << 4).flatten(-2).float() - 32
    scales = blocks[..., 192:208].contiguous().view(torch.int8) * _half(blocks, 208)[..., None]
    weight = torch.unflatten(codes, -1, (16, 16)) * scales[..., None]
    return weight.flatten(1)


def _weight(
    codes: torch.Tensor, bits: int, scales: torch.Tensor, offsets: torch.Tensor
) -> QuantizedWeight:
    flat = codes.reshape(codes.shape[0], -1).view(torch.int8)
    return QuantizedWeight(4 if bits == 4 else 8, flat, scales, offsets)


def _half(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The float16 at byte `offset` of each block, as float32 [N, blocks]."""
    pair = blocks[..., offset : offset + 2].contiguous()
    return pair.view(torch.float16).squeeze(-1).float()


_UNPACK: dict[GGMLType, Callable[[torch.Tensor], QuantizedWeight | torch.Tensor]] = {
    GGMLType.Q4_0: lambda blocks: _legacy(blocks, 4, has_minimum=False),
    GGMLType.Q4_1: lambda blocks: _legacy(blocks, 4, has_minimum=True),
    GGMLType.Q5_0: lambda blocks: _legacy(blocks, 5, has_minimum=False),
    GGMLType.Q5_1: lambda blocks: _legacy(blocks, 5, has_minimum=True),
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_K: lambda blocks: _k_quants(blocks, 4),
    GGMLType.Q5_K: lambda blocks: _k_quants(blocks, 5),
    GGMLType.Q6_K: _q6_k,
}
PACKED_TYPES = tuple(_UNPACK)
