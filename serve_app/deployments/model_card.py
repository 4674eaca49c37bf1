"""The model as the API shows it, from its files alone: known before any engine is up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serve_app.config.model_source import ModelFormat, ModelSource, resolve_model
from serve_app.config.schema import ModelSection
from serve_app.core.errors import ConfigError
from serve_app.core.requests import ModelCard
from serve_app.models.embedding_config import embedding_config
from serve_app.models.gguf import GGUFFile
from serve_app.text.chat_template import THINK_CLOSE
from serve_app.text.tokenizer import Tokenizer
from serve_app.text.tool_calls.registry import resolve_tool_syntax

_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def build_model_card(model: ModelSection, tokenizer: Tokenizer) -> ModelCard:
    """Return the model's card. Raises ConfigError where a file is missing or says too little."""
    source = resolve_model(model)
    context_length = _context_length(source)
    embedding = embedding_config(model, source)
    if embedding is not None and embedding.max_tokens is not None:
        context_length = min(context_length, embedding.max_tokens)
    if model.max_model_len is not None and model.max_model_len > context_length:
        raise ConfigError(
            f"model.max_model_len: {model.max_model_len} is more than the {context_length} tokens"
            f" that {source.name} was made for; lower it",
            param="model.max_model_len",
        )
    return ModelCard(
        id=source.name,
        aliases=model.aliases,
        max_model_len=model.max_model_len or context_length,
        vocab_size=tokenizer.vocab_size,
        created=int(source.path.stat().st_mtime),
        root=source.path.name,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        default_sampling={**_generation_defaults(source), **model.default_sampling},
        has_chat_template=tokenizer.chat_template is not None,
        is_reasoning=_is_reasoning(model, tokenizer),
        tool_syntax=resolve_tool_syntax(model.tool_call_parser, tokenizer.chat_template),
        embedding_size=None if embedding is None else embedding.size,
        can_shorten_embeddings=embedding is not None and embedding.can_shorten,
    )


def _context_length(source: ModelSource) -> int:
    if source.format is ModelFormat.GGUF:
        metadata = GGUFFile(source.path).metadata
        architecture = metadata.get("general.architecture", "")
        length = metadata.get(f"{architecture}.context_length")
    else:
        config = _read_json(source.path / "config.json")
        inner = config.get("text_config")
        values = {**config, **inner} if isinstance(inner, dict) else config
        length = next((values[key] for key in _CONTEXT_KEYS if values.get(key)), None)
    if not isinstance(length, int) or length < 1:
        raise ConfigError(
            f"model.path: {source.path.name} says no context length; set model.max_model_len",
            param="model.max_model_len",
        )
    return length


def _generation_defaults(source: ModelSource) -> dict[str, Any]:
    if source.format is ModelFormat.GGUF:
        return {}
    path = source.path / "generation_config.json"
    values = _read_json(path) if path.is_file() else {}
    if values.get("do_sample") is False:
        return {}
    return {key: values[key] for key in _SAMPLING_DEFAULTS if values.get(key) is not None}


def _is_reasoning(model: ModelSection, tokenizer: Tokenizer) -> bool:
    if model.reasoning != "auto":
        return model.reasoning != "none"
    return THINK_CLOSE in (tokenizer.chat_template or "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(
            f"model.path: {path.name} is not readable JSON; copy the model again",
            param="model.path",
        ) from None
    return values if isinstance(values, dict) else {}
