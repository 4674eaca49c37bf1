"""Whether a model's files make it one for embeddings, and how its hidden states are pooled.

Formats: sentence-transformers' folder (modules.json, 1_Pooling/config.json,
sentence_bert_config.json), and GGUF's `{architecture}.pooling_type` (llama.cpp's numbers). Torch
is not needed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from serve_app.config.model_source import ModelFormat, ModelSource
from serve_app.config.schema import ModelSection
from serve_app.core.errors import ConfigError
from serve_app.models.config import read_json
from serve_app.models.gguf import GGUFFile

Pooling = Literal["last", "mean", "cls"]

_GGUF_POOLING: Mapping[int, Pooling] = {1: "mean", 2: "cls", 3: "last"}
_FLAGS: Mapping[str, Pooling] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}
_NAMES: Mapping[str, Pooling] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
_MODULES = frozenset({"Transformer", "Pooling", "Normalize"})


@dataclass(frozen=True, slots=True)
class EmbeddingConfig:
    """How a prompt becomes a vector of `size` values.

    normalize: scale it to length 1. can_shorten: its first values are an embedding too.
    max_tokens: longest input that the model was trained for, None where its files do not say.
    """

    pooling: Pooling
    normalize: bool
    size: int
    can_shorten: bool = False
    max_tokens: int | None = None


def embedding_config(model: ModelSection, source: ModelSource) -> EmbeddingConfig | None:
    """Return how `source` embeds, None for a model that generates.

    Raises ConfigError for files that ask for a pooling or a layer that is not known here.
    """
    if model.task == "generate":
        return None
    given = model.embedding
    asked = None if given.pooling == "auto" else given.pooling
    if source.format is ModelFormat.GGUF:
        told = _from_gguf(source.path)
    else:
        told = _from_folder(source.path, asked)
    if told is None and model.task == "auto":
        return None
    told = told or _plain(source)
    return EmbeddingConfig(
        pooling=asked or told.pooling,
        normalize=told.normalize if given.normalize is None else given.normalize,
        size=told.size,
        can_shorten=told.can_shorten if given.allow_dimensions is None else given.allow_dimensions,
        max_tokens=told.max_tokens,
    )


def _plain(source: ModelSource) -> EmbeddingConfig:
    """Return what holds where the files tell nothing of embeddings, but the config does."""
    if source.format is ModelFormat.GGUF:
        return EmbeddingConfig("last", True, _gguf_size(GGUFFile(source.path).metadata))
    values = read_json(source.path / "config.json")
    return EmbeddingConfig("last", True, _size(values), _is_nested(values))


def _from_gguf(path: Path) -> EmbeddingConfig | None:
    metadata = GGUFFile(path).metadata
    kind = metadata.get(f"{metadata.get('general.architecture')}.pooling_type")
    pooling = _GGUF_POOLING.get(kind) if isinstance(kind, int) else None
    return None if pooling is None else EmbeddingConfig(pooling, True, _gguf_size(metadata))


def _gguf_size(metadata: Mapping[str, Any]) -> int:
    return _checked_size(metadata.get(f"{metadata.get('general.architecture')}.embedding_length"))


def _from_folder(folder: Path, asked: Pooling | None) -> EmbeddingConfig | None:
    if not (folder / "modules.json").is_file():
        return None
    modules = _read_modules(folder)
    values = read_json(folder / "config.json")
    return EmbeddingConfig(
        pooling=asked or _folder_pooling(folder, modules),
        normalize="Normalize" in modules,
        size=_size(values),
        can_shorten=_is_nested(values),
        max_tokens=_max_tokens(folder),
    )


def _read_modules(folder: Path) -> dict[str, str]:
    """Return the folder's modules, kind → sub-folder. Raises ConfigError on one not known here."""
    try:  # a list at the top, which `read_json` refuses
        entries = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        modules = {str(entry["type"]).rpartition(".")[2]: str(entry["path"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError):
        raise _unusable("modules.json is not readable") from None
    if unknown := sorted(modules.keys() - _MODULES):
        raise _unusable(f"modules.json asks for {', '.join(unknown)}, which is not supported")
    return modules


def _folder_pooling(folder: Path, modules: Mapping[str, str]) -> Pooling:
    path = folder / modules.get("Pooling", "1_Pooling") / "config.json"
    if "Pooling" not in modules or not path.resolve().is_relative_to(folder.resolve()):
        raise _unusable("modules.json names no folder of a Pooling module")
    values = read_json(path)
    named = values.get("pooling_mode")
    modes = {key for key, value in values.items() if key.startswith("pooling_mode_") and value}
    if isinstance(named, str):
        modes, known = {named}, _NAMES
    else:
        known = _FLAGS
    if len(modes) != 1 or not modes <= known.keys():
        raise _unusable(
            f"1_Pooling/config.json asks for {', '.join(sorted(modes)) or 'nothing'};"
            " set model.embedding.pooling: last, mean or cls"
        )
    return known[modes.pop()]


def _max_tokens(folder: Path) -> int | None:
    path = folder / "sentence_bert_config.json"
    value = read_json(path).get("max_seq_length") if path.is_file() else None
    return value if isinstance(value, int) and value > 0 else None


def _is_nested(values: Mapping[str, Any]) -> bool:
    return bool(values.get("is_matryoshka") or values.get("matryoshka_dimensions"))


def _size(values: Mapping[str, Any]) -> int:
    inner = values.get("text_config")
    return _checked_size((inner if isinstance(inner, dict) else values).get("hidden_size"))


def _checked_size(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise _unusable("the model's files tell no hidden size")
    return value


def _unusable(why: str) -> ConfigError:
    return ConfigError(
        f"model.path: {why}; for text generation set model.task: generate", param="model.path"
    )
