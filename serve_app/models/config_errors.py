"""What config readers share: the architectures known here, and the errors for what is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve_app.core.errors import ConfigError

ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
)
"""Values of `model_type` in config.json that the native networks know."""


class UnsupportedArchitectureError(ConfigError):
    """The native network lacks this architecture or a trait of it; another engine may have it."""

    code = "unsupported_architecture"


def unsupported(what: str) -> UnsupportedArchitectureError:
    """The error for a model that needs `what`."""
    return UnsupportedArchitectureError(
        f"model.path: the native engine has no {what} (it knows {', '.join(ARCHITECTURES)});"
        " set engine.kind: transformers, or name another model",
        param="model.path",
    )


def required(values: Mapping[str, Any], name: str) -> int:
    """The whole number `name` of a config.json. Raises ConfigError where it is none."""
    value = values.get(name)
    if not isinstance(value, int):
        raise ConfigError(
            f"model.path: config.json has {name} = {value!r}, where a whole number is needed",
            param="model.path",
        )
    return value
