"""Counter-based random numbers: a function of (seed, position) alone, whatever the batch."""

from __future__ import annotations

import torch

_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def to_signed(value: int) -> int:
    """The int64 with the same low 64 bits as `value`."""
    value &= _MASK_64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function (Steele, Lea and Flood 2014) on int64, wrapping."""
    x = x + to_signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * to_signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * to_signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def uniforms(seeds: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent float32 [S] in [0, 1) per (seed, position), both int64 [S].

    24 bits each, taken from one 64-bit word: float32 holds them exactly, so no device needs fp64.
    """
    bits = splitmix64(splitmix64(seeds) ^ positions)
    scale = 2.0**-24
    first = _shift_right(bits, 40).to(torch.float32) * scale
    second = (_shift_right(bits, 16) & 0xFFFFFF).to(torch.float32) * scale
    return first, second
