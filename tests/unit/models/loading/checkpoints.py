"""Writes tiny checkpoints in the formats that the loader reads, from the formats' documentation.

Each writer takes rounded layers (codes, scales, zeros) and returns the tensors of one layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Rounded:
    """A layer [N, K]: codes 0 .. 2^bits - 1, scales and zeros [N, G], the group of each column."""

    bits: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    index: np.ndarray

    @property
    def dense(self) -> torch.Tensor:
        codes = self.codes.astype(np.float64) - self.zeros[:, self.index]
        return torch.from_numpy((codes * self.scales[:, self.index]).astype(np.float32))


def round_layer(
    weight: torch.Tensor,
    bits: int = 4,
    group_size: int = 32,
    *,
    sym: bool = True,
    shuffled: bool = False,
    scale_type: Callable[[np.ndarray], np.ndarray] = np.float16,
) -> Rounded:
    values = weight.double().numpy()
    num_columns = values.shape[1]
    size = num_columns if group_size == -1 else group_size
    index = np.arange(num_columns) // size
    if shuffled:
        index = np.random.default_rng(num_columns).permutation(index)
    num_groups, limit = index.max() + 1, 2**bits - 1
    scales = np.zeros((values.shape[0], num_groups))
    zeros = np.full_like(scales, 2 ** (bits - 1))
    for group in range(num_groups):
        part = values[:, index == group]
        if sym:
            scales[:, group] = np.abs(part).max(1) / (2 ** (bits - 1) - 1 or 1)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scales[:, group] = (high - low) / limit
            zeros[:, group] = np.clip(np.round(-low / scales[:, group]), 0, limit)
    scales = scale_type(scales).astype(np.float64)
    codes = np.round(values / scales[:, index]) + zeros[:, index]
    return Rounded(bits, np.clip(codes, 0, limit).astype(np.uint8), scales, zeros, index)


def pack(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Pack rows: place j of a word, at bit j * bits, holds its column j, or order[j] if given."""
    per_word = 32 // bits
    values = np.pad(values.astype(np.uint32), ((0, 0), (0, -values.shape[1] % per_word)))
    words = np.zeros((values.shape[0], values.shape[1] // per_word), dtype=np.uint32)
    for word in range(words.shape[1]):
        for place in range(per_word):
            column = word * per_word + (order or range(per_word))[place]
            words[:, word] |= values[:, column] << np.uint32(bits * place)
    return torch.from_numpy(words.view(np.int32).copy())


def gptq(layer: Rounded, *, version: int = 1, with_index: bool = True) -> dict[str, torch.Tensor]:
    zeros = (layer.zeros.T.astype(np.int64) - (version == 1)) % 2**layer.bits
    parts = {
        "qweight": pack(layer.codes, layer.bits).T.contiguous(),
        "qzeros": pack(zeros, layer.bits),
        "scales": torch.from_numpy(layer.scales.T.astype(np.float16).copy()),
    }
    if with_index:
        parts["g_idx"] = torch.from_numpy(layer.index.astype(np.int32))
    return parts


def awq(layer: Rounded) -> dict[str, torch.Tensor]:
    return {
        "qweight": pack(layer.codes.T, 4, AWQ_ORDER),
        "qzeros": pack(layer.zeros.T, 4, AWQ_ORDER),
        "scales": torch.from_numpy(layer.scales.T.astype(np.float16).copy()),
    }


def pack_quantized(layer: Rounded, *, sym: bool, with_index: bool = False) -> dict[str, Any]:
    parts = {
        "weight_packed": pack(layer.codes, layer.bits),
        "weight_scale": torch.from_numpy(layer.scales).to(torch.bfloat16),
        "weight_shape": torch.tensor(layer.codes.shape),
    }
    if not sym:
        parts["weight_zero_point"] = pack(layer.zeros.T, layer.bits).T.contiguous()
    if with_index:
        parts["weight_g_idx"] = torch.from_numpy(layer.index.astype(np.int32))
    return parts


def int_quantized(layer: Rounded, *, sym: bool) -> dict[str, torch.Tensor]:
    half = 2 ** (layer.bits - 1)
    parts = {
        "weight": torch.from_numpy((layer.codes.astype(np.int16) - half).astype(np.int8)),
        "weight_scale": torch.from_numpy(layer.scales).to(torch.bfloat16),
    }
    if not sym:
        zeros = (layer.zeros - half).astype(np.int8)
        parts["weight_zero_point"] = torch.from_numpy(zeros)
    return parts


def fp8_blocks(
    weight: torch.Tensor, block: int = 128, *, powers: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The two tensors, and what they stand for, block by block."""
    rows, columns = -(-weight.shape[0] // block), -(-weight.shape[1] // block)
    stored, dense = torch.empty(weight.shape), torch.empty(weight.shape)
    scales = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            where = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
            scale = weight[where].abs().max() / 448
            scale = torch.exp2(torch.ceil(torch.log2(scale))) if powers else scale
            scales[i, j] = scale
            stored[where] = (weight[where] / scale).to(torch.float8_e4m3fn).float()
            dense[where] = stored[where] * scale
    scale_type = torch.float8_e8m0fnu if powers else torch.float32
    parts = {"weight": stored.to(torch.float8_e4m3fn), "weight_scale_inv": scales.to(scale_type)}
    return parts, dense


def rewrite(
    folder: Path,
    quantization: dict[str, Any],
    change: Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor] | None],
) -> dict[str, torch.Tensor]:
    """Replace weights of a saved model by the parts that `change` gives for a layer's name.

    Returns all weights as they now are, dense, under transformers' names.
    """
    weights = load_file(folder / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    dense: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        changed = change(layer, weight) if weight.dim() == 2 else None
        if changed is None:
            stored[name] = dense[name] = weight
            continue
        parts, dense[name] = changed
        stored |= {f"{layer}.{suffix}": part.contiguous() for suffix, part in parts.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return dense
