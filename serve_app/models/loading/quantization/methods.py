"""The names of the formats that the loader reads. No torch: the command line asks too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve_app.models.config_errors import UnsupportedArchitectureError

QUANTIZATION_METHODS = (
    "fp8",
    "gptq",
    "awq",
    "auto-round",
    "intel/auto-round",
    "compressed-tensors",
)
"""Values of `quant_method` in a checkpoint's quantization_config; `table` has a format for each."""


def check_quantization(values: Mapping[str, Any]) -> None:
    """Raise UnsupportedArchitectureError, one line, where no format has the quant_method."""
    method = values.get("quant_method", "unknown")
    if method not in QUANTIZATION_METHODS:
        raise UnsupportedArchitectureError(
            "model.path: the native engine has no loader for checkpoints of quant_method"
            f" {method!r} (it reads {', '.join(QUANTIZATION_METHODS)}, and GGUF files);"
            " set engine.kind: transformers, or take the model in one of these formats",
            param="model.path",
        )
