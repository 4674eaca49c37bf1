"""Packed words into codes, and codes with scales and zeros into the network's groups of 32."""

from __future__ import annotations

import torch

from serve_app.models.loading.quantization.layout import LayoutError
from serve_app.models.quantized import GROUP_SIZE, QuantizedWeight

_ROWS_AT_ONCE = 4096
_SIGN = 0x80


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, W] → uint8 [R, W * 32 / bits], the lowest bits of a word first."""
    if words.dtype is not torch.int32 or words.dim() != 2:
        raise LayoutError(f"packed words are {words.dtype} {list(words.shape)}, not int32 [R, W]")
    if bits not in (2, 4, 8):
        raise LayoutError(f"{bits} bits per weight are not read (2, 4 and 8 are)")
    data = words.contiguous().view(torch.uint8)
    if bits == 8:
        return data
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
    return (data[..., None] >> shifts & (1 << bits) - 1).flatten(1)


def bits_of(num_words: int, num_values: int) -> int:
    """The width of `num_values` values in `num_words` words of 32 bits; the last may be padded."""
    widths = (2, 4, 8)
    for bits in widths:
        if num_values * bits == 32 * num_words:
            return bits
    for bits in widths:
        if -(-num_values * bits // 32) == num_words:
            return bits
    raise LayoutError(f"{num_words} words for {num_values} values are not 2, 4 or 8 bits each")


def group_size_of(num_columns: int, num_groups: int, configured: int | None) -> int:
    """Columns per scale: the configured size where it fits the tensors, else what they show."""
    if configured is not None and configured > 0 and -(-num_columns // configured) == num_groups:
        return configured
    if num_groups and num_columns % num_groups == 0:
        return num_columns // num_groups
    raise LayoutError(f"{num_groups} groups do not divide {num_columns} columns")


def from_groups(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> QuantizedWeight | torch.Tensor:
    """w = (code - zero) · scale in groups of neighbouring columns.

    `codes` is uint8 [N, K] below 2^bits, `scales` and `zeros` [N, G] where the last group may be
    shorter. Groups of 64, 128 or a whole row repeat their scale for each 32 columns, exactly.
    Dense in `dtype` where K or the group is no multiple of 32.
    """
    num_rows, num_columns = codes.shape
    num_groups = -(-num_columns // group_size)
    if scales.shape != (num_rows, num_groups) or zeros.shape != scales.shape:
        raise LayoutError(
            f"codes {list(codes.shape)} in groups of {group_size} do not fit scales"
            f" {list(scales.shape)} and zeros {list(zeros.shape)}"
        )
    if num_columns % GROUP_SIZE or (group_size % GROUP_SIZE and num_groups > 1):
        index = torch.arange(num_columns, device=codes.device) // group_size
        return from_indexed_groups(codes, scales, zeros, index, dtype)
    scales, zeros = scales.float(), zeros.float()
    if bits == 8:
        codes = codes ^ _SIGN
        offsets = (128 - zeros) * scales
    else:
        offsets = -zeros * scales
    if group_size != GROUP_SIZE:
        repeats = -(-group_size // GROUP_SIZE)
        scales, offsets = (
            each.repeat_interleave(repeats, dim=1)[:, : num_columns // GROUP_SIZE].contiguous()
            for each in (scales, offsets)
        )
    return QuantizedWeight(8 if bits == 8 else 4, codes.view(torch.int8), scales, offsets)


def from_indexed_groups(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    index: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dense [N, K] of w = (code - zero) · scale, where column k belongs to group `index`[k]."""
    num_groups = scales.shape[1]
    if index.shape != codes.shape[1:] or int(index.min()) < 0 or int(index.max()) >= num_groups:
        raise LayoutError(f"group indices {list(index.shape)} do not fit {num_groups} groups")
    index = index.long()
    dense = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for start in range(0, codes.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        values = codes[rows].float().sub_(zeros[rows].float()[:, index])
        dense[rows] = values.mul_(scales[rows].float()[:, index])
    return dense
