"""Rotary position embedding: frequencies with their scalings, and a table of cos/sin rows.

Rotary: Su et al., RoFormer (2104.09864), in the half-split order of transformers. YaRN: Peng et
al. (2309.00071). llama3: the scaling of Llama 3.1's reference code.
"""

from __future__ import annotations

import math

import torch

from serve_app.models.config import NetworkConfig, RopeScaling


def inverse_frequencies(config: NetworkConfig) -> tuple[torch.Tensor, float]:
    """Return float32 [rope_dim / 2] on the CPU, and the factor on cos and sin (1 but for YaRN)."""
    exponents = torch.arange(0, config.rope_dim, 2, dtype=torch.float32) / config.rope_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    return _yarn(frequencies, config, scaling), _yarn_attention_factor(scaling)


def attention_scale(config: NetworkConfig) -> float:
    """The factor on query · key: 1 / √head_dim; latent attention adds YaRN's mscale, squared.

    DeepSeek stretches the logits by `mscale_all_dim` here, and cos and sin by the quotient of
    `mscale` and `mscale_all_dim` (DeepSeek-V2's published model code).
    """
    scaling = config.rope_scaling
    scale = config.head_dim**-0.5
    if config.latent is None or scaling is None or not scaling.mscale_all_dim:
        return scale
    return scale * _mscale(scaling, scaling.mscale_all_dim) ** 2


def rotary_table(
    frequencies: torch.Tensor, factor: float, max_position: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cos, sin), each float32 [max_position, 2 * len(frequencies)].

    With rolled(x) = x shifted by half the rotary size, rotated = x · cos + rolled(x) · sin: the
    minus sign of the half-split form is in `sin`.
    """
    positions = torch.arange(max_position, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_max_position / wavelengths - low) / (high - low)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def _yarn(frequencies: torch.Tensor, config: NetworkConfig, scaling: RopeScaling) -> torch.Tensor:
    dim = config.rope_dim

    def correction_dim(num_rotations: float) -> float:
        periods = scaling.original_max_position / (num_rotations * 2 * math.pi)
        return dim * math.log(periods) / (2 * math.log(config.rope_theta))

    low, high = correction_dim(scaling.beta_fast), correction_dim(scaling.beta_slow)
    if scaling.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    steps = torch.arange(dim // 2, dtype=torch.float32)
    ramp = ((steps - low) / (high - low or 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling, scaling.mscale) / _mscale(scaling, scaling.mscale_all_dim)
    return _mscale(scaling, 1.0)


def _mscale(scaling: RopeScaling, weight: float) -> float:
    return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0
