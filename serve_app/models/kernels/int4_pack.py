"""The INT4 weight's layout in memory, its packing, and the plain PyTorch reading of it.

A row of the weight is cut into runs of 32 columns, four 32-bit words each: nibble i (bits 4i to
4i + 3) of word j holds column 4i + j of the run. A 16-byte load thus brings one run, and the four
words' nibbles i meet four neighbouring activations. Scale and zero of a group lie in one 32-bit
word as two float16: scale in the low half, zero in the high.

In a weight that is tiled for the tensor cores, nibbles i and i + 4 of word j (i < 4) hold the
neighbouring columns 8i + 2j and 8i + 2j + 1: what they meet is one 32-bit word of the activations.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

GROUP_SIZES = (32, 64, 128)
RUN = 32
TILE_ROWS, TILE_RUNS = 16, 4
_WORDS = 4


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A group-wise INT4 matrix [N, K] with w = (q - zero) · scale.

    words: int32 [N, K/8]; scale_zero: int32 [N, K/group_size]; layouts in the module's docstring.
    `is_tiled`: in the order of `tile_int4`, for the tensor cores.
    """

    words: torch.Tensor
    scale_zero: torch.Tensor
    group_size: int
    is_tiled: bool = False

    @property
    def out_features(self) -> int:
        """N."""
        return self.words.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.words.shape[1] * 8

    @property
    def num_bytes(self) -> int:
        """Bytes that a product reads."""
        return self.words.nbytes + self.scale_zero.nbytes

    def to(self, device: torch.device | str) -> "Int4Weight":
        """Return the weight on another device."""
        return Int4Weight(
            self.words.to(device), self.scale_zero.to(device), self.group_size, self.is_tiled
        )


def pack_int4(
    quantized: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None
) -> Int4Weight:
    """Pack integers 0..15 [N, K] with scales and zeros [K/g, N]; without zeros each is 8.

    Zeros may be fractional. Raises ValueError where the shapes don't fit, g is not 32, 64 or 128,
    or a scale or zero leaves float16's range.
    """
    size, depth = quantized.shape
    if scales.ndim != 2 or scales.shape[1] != size or depth % max(1, scales.shape[0]):
        raise ValueError(f"scales must be [K/g, {size}] with K = {depth}, got {list(scales.shape)}")
    group_size = depth // scales.shape[0]
    if group_size not in GROUP_SIZES or depth % group_size:
        raise ValueError(f"group size must be one of {GROUP_SIZES}, got {group_size}")
    if zeros is None:
        zeros = torch.full_like(scales, 8.0)
    if zeros.shape != scales.shape:
        raise ValueError(f"zeros must be {list(scales.shape)} like scales, got {list(zeros.shape)}")
    pair = torch.stack((scales.T, zeros.T), dim=-1).to(torch.float16).contiguous()
    if not torch.isfinite(pair).all():
        raise ValueError("scales and zeros must fit float16")
    runs = quantized.to(torch.int32).view(size, depth // RUN, 8, _WORDS)
    words = torch.zeros((size, depth // RUN, _WORDS), dtype=torch.int32, device=quantized.device)
    for nibble in range(8):
        words |= (runs[:, :, nibble] & 15) << (4 * nibble)
    return Int4Weight(words.view(size, depth // 8), pair.view(torch.int32).squeeze(-1), group_size)


def can_tile(weight: Int4Weight) -> bool:
    """Whether N is a multiple of 16 and K one of 128."""
    return weight.out_features % TILE_ROWS == 0 and weight.in_features % (TILE_RUNS * RUN) == 0


def tile_int4(weight: Int4Weight) -> Int4Weight:
    """Return the weight in tiles of 16 rows × 128 columns, each one after the other in memory.

    Within a tile row by row; tiles in the order of their columns, then rows. One warp's loads are
    then 512 bytes in a piece. Nibbles as the module's docstring says. The shapes stay.
    """
    assert can_tile(weight)
    assert not weight.is_tiled
    size, groups = weight.out_features, weight.scale_zero.shape[1]
    steps = weight.in_features // (TILE_RUNS * RUN)
    words, pairs = (
        tensor.view(size // TILE_ROWS, TILE_ROWS, steps, -1).transpose(1, 2).contiguous()
        for tensor in (_move_nibbles(weight.words, _row_place, _tile_place), weight.scale_zero)
    )
    return Int4Weight(words.view(size, -1), pairs.view(size, groups), weight.group_size, True)


def untile_int4(weight: Int4Weight) -> Int4Weight:
    """Return the weight row by row, as pack_int4 makes it."""
    if not weight.is_tiled:
        return weight
    size, groups = weight.out_features, weight.scale_zero.shape[1]
    steps = weight.in_features // (TILE_RUNS * RUN)
    words, pairs = (
        tensor.view(size // TILE_ROWS, steps, TILE_ROWS, -1).transpose(1, 2).contiguous()
        for tensor in (weight.words, weight.scale_zero)
    )
    words = _move_nibbles(words.view(size, -1), _tile_place, _row_place)
    return Int4Weight(words, pairs.view(size, groups), weight.group_size)


def _row_place(column: int) -> tuple[int, int]:
    """Word and nibble of a run's column in a weight that lies row by row."""
    return column % 4, column // 4


def _tile_place(column: int) -> tuple[int, int]:
    """Word and nibble of a run's column in a tiled weight."""
    return column % 8 // 2, column // 8 + 4 * (column % 2)


def _move_nibbles(
    words: torch.Tensor,
    source: Callable[[int], tuple[int, int]],
    target: Callable[[int], tuple[int, int]],
) -> torch.Tensor:
    """[N, K/8] with each run's columns moved from their place in one order to that in another."""
    runs = words.view(words.shape[0], -1, _WORDS)
    moved = torch.zeros_like(runs)
    for column in range(RUN):
        (from_word, from_nibble), (to_word, to_nibble) = source(column), target(column)
        code = (runs[..., from_word] >> (4 * from_nibble)) & 15
        moved[..., to_word] |= code << (4 * to_nibble)
    return moved.view_as(words)


def unpack_int4(weight: Int4Weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what pack_int4 took: integers uint8 [N, K], float16 scales and zeros [K/g, N]."""
    weight = untile_int4(weight)
    size, depth = weight.out_features, weight.in_features
    words = weight.words.view(size, depth // RUN, 1, _WORDS)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device).view(1, 1, 8, 1)
    quantized = ((words >> shifts) & 15).to(torch.uint8).view(size, depth)
    pair = weight.scale_zero.unsqueeze(-1).view(torch.float16)
    return quantized, pair[..., 0].T, pair[..., 1].T


def dequantize_int4_torch(weight: Int4Weight, dtype: torch.dtype) -> torch.Tensor:
    """Return the dense [N, K]; computed in float32, rounded once."""
    quantized, scales, zeros = unpack_int4(weight)
    grouped = quantized.view(weight.out_features, -1, weight.group_size).float()
    dense = (grouped - zeros.T.float().unsqueeze(-1)) * scales.T.float().unsqueeze(-1)
    return dense.view(weight.out_features, weight.in_features).to(dtype)


def int4_linear_torch(
    hidden: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """[M, K] · [N, K]ᵀ + [N] → [M, N] through the dense weight."""
    return F.linear(hidden, dequantize_int4_torch(weight, hidden.dtype), bias)
