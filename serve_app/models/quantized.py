"""Matrices in groups of 32 columns: w = code · scale + offset, with 4- or 8-bit codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

GROUP_SIZE = 32
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A matrix [N, K] in groups of 32 columns.

    `codes` is int8 [N, K]: 0..15 where `bits` is 4, any int8 where it is 8. `scales` and `offsets`
    are float32 [N, K / 32].
    """

    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    def shared_groups(self) -> int:
        """How many neighbouring groups share scale and offset all over the matrix: 4, 2 or 1."""
        num_rows, num_groups = self.scales.shape
        for each in (4, 2):
            if num_groups % each:
                continue
            wide = (x.view(num_rows, -1, each) for x in (self.scales, self.offsets))
            if all(torch.equal(x, x[..., :1].expand_as(x)) for x in wide):
                return each
        return 1

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dense matrix [N, K]; where the codes are; in float32, a few rows at a time."""
        dense = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for start in range(0, self.shape[0], _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            groups = _groups(self.codes[rows].float())
            groups.mul_(self.scales[rows, :, None]).add_(self.offsets[rows, :, None])
            dense[rows] = groups.flatten(1)
        return dense


def _halved(scales: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as float16 holds them, half the bytes to read, where that keeps ten bits of each.

    As they are where one is too large or too small for it, or is a group's only value.
    """
    halves = scales.half().float(), offsets.half().float()
    for half, whole in zip(halves, (scales, offsets), strict=True):
        if ((half - whole).abs() > whole.abs() * 2**-10).any():
            return scales, offsets
    if ((scales == 0) & (halves[1] != offsets)).any():
        return scales, offsets
    return halves


def quantize(weight: torch.Tensor, bits: int, group_size: int = GROUP_SIZE) -> QuantizedWeight:
    """Round a dense matrix [N, K]: 4 bits between each group's extremes, 8 bits around zero.

    `group_size` is a multiple of 32 that divides K; groups wider than 32 repeat their scale.
    """
    parts = [_quantize_rows(rows, bits, group_size) for rows in torch.split(weight, _ROWS_AT_ONCE)]
    return concatenate(parts)


def concatenate(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Stack matrices [N_i, K] by rows; 4-bit codes among 8-bit ones count as 8-bit, exactly."""
    return QuantizedWeight(
        max(part.bits for part in parts),
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.offsets for part in parts]),
    )


def _quantize_rows(weight: torch.Tensor, bits: int, group_size: int) -> QuantizedWeight:
    groups = weight.float().view(weight.shape[0], -1, group_size)
    if bits == 8:
        scales = groups.abs().amax(-1) / 127
        offsets = torch.zeros_like(scales)
    else:
        low, high = groups.aminmax(dim=-1)
        scales, offsets = (high - low) / 15, low
    if bits == 4:
        scales, offsets = _halved(scales, offsets)
    steps = scales.clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((groups - offsets[..., None]) / steps[..., None]).round_()
    limits = (-127, 127) if bits == 8 else (0, 15)
    if (repeats := group_size // GROUP_SIZE) > 1:
        scales, offsets = (x.repeat_interleave(repeats, dim=1) for x in (scales, offsets))
    return QuantizedWeight(bits, codes.clamp_(*limits).to(torch.int8).flatten(1), scales, offsets)


def _groups(matrix: torch.Tensor) -> torch.Tensor:
    """[N, K] → [N, K / 32, 32]."""
    return matrix.view(matrix.shape[0], -1, GROUP_SIZE)
