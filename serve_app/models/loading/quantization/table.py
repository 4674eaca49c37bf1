"""Which format reads a folder's weights, by the quant_method of its config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from serve_app.models.config import read_json
from serve_app.models.loading.quantization.auto_round import auto_round
from serve_app.models.loading.quantization.awq import AWQ
from serve_app.models.loading.quantization.compressed_tensors import compressed_tensors
from serve_app.models.loading.quantization.fp8 import BlockFP8
from serve_app.models.loading.quantization.gptq import GPTQ
from serve_app.models.loading.quantization.layout import QuantizationFormat
from serve_app.models.loading.quantization.methods import check_quantization
from serve_app.models.loading.quantization.source import QuantizedSource
from serve_app.models.loading.safetensors_source import STORED_TYPES, SafetensorsSource

FORMATS: dict[str, Callable[[Mapping[str, Any]], QuantizationFormat]] = {
    "fp8": BlockFP8,
    "gptq": GPTQ,
    "awq": AWQ,
    "auto-round": auto_round,
    "intel/auto-round": auto_round,
    "compressed-tensors": compressed_tensors,
}
"""Makes a format from the checkpoint's quantization_config."""

_OLD_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def open_folder(
    folder: Path, device: torch.device, dtype: torch.dtype, expected: Iterable[str]
) -> SafetensorsSource | QuantizedSource:
    """The source of a Hugging Face folder, plain or quantized.

    Weights that cannot stay packed become `dtype`. `expected` are the names that the network needs.
    Raises UnsupportedArchitectureError, one line, for a format that is not known, ConfigError for
    files that are missing or damaged.
    """
    values = quantization_config(folder)
    if values is None:
        return SafetensorsSource(folder)
    check_quantization(values)
    quantization = FORMATS[str(values["quant_method"])](values)
    source = QuantizedSource(SafetensorsSource(folder, STORED_TYPES), quantization, device, dtype)
    source.drop_empty_biases(expected)
    return source


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """How the folder says that its weights are quantized: in config.json, or in an older file."""
    config = read_json(folder / "config.json")
    for name in ("quantization_config", "compression_config"):
        if config.get(name):
            return dict(config[name])
    for name, method in _OLD_FILES.items():
        if (folder / name).is_file():
            return {"quant_method": method} | read_json(folder / name)
    return None
