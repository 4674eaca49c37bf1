"""Builds the engine that the config asks for; torch is imported where an engine needs it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable

from serve_app.config.model_source import ModelFormat, ModelSource, resolve_model
from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.errors import ConfigError
from serve_app.engine.protocol import Engine
from serve_app.models.embedding_config import EmbeddingConfig, embedding_config

_LOG = logging.getLogger(__name__)
_DEFAULT_MODEL_LEN = 8192

Progress = Callable[[str, float], None]
"""Told (stage, seconds since the engine's start) as loading goes on."""


def create_engine(
    model: ModelSection,
    engine: EngineSection,
    on_progress: Progress = lambda stage, seconds: None,
    on_choice: Callable[[str], None] = lambda reason: None,
) -> Engine:
    """Load the model and start its engine.

    `auto` is what `choose_engine` says where the architecture is known, else transformers;
    `on_choice` is told why it is this engine, the last time it is called. Raises
    ConfigError, one line with the fix, for anything that the config asks for and this installation
    cannot give.
    """
    started = time.perf_counter()

    def tell(stage: str) -> None:
        on_progress(stage, time.perf_counter() - started)

    source = resolve_model(model)
    on_choice(_reason_without_choice(engine))
    if (embedding := embedding_config(model, source)) is not None:
        return _create_embedding(source, model, engine, embedding, tell)
    if engine.fixed_rate_tokens_per_s is not None:
        return _create_fixed_rate(source, model, engine)
    if engine.kind == "openvino" or _is_openvino_chosen(source, model, engine, tell, on_choice):
        return _create_openvino(source, model, engine, tell)
    if engine.kind == "ipex":
        return _create_ipex(source, model, engine, tell)
    if engine.kind == "transformers":
        return _create_transformers(source, model, engine, tell)
    from serve_app.models.config import UnsupportedArchitectureError

    try:
        return _create_native(source, model, engine, tell)
    except UnsupportedArchitectureError as error:
        is_bound = engine.kind == "native" or engine.tensor_parallel_size > 1
        if is_bound or source.format is not ModelFormat.HUGGING_FACE:
            raise
        _LOG.info("%s; the transformers engine takes it", error.message)
        on_choice(error.message)
    return _create_transformers(source, model, engine, tell)


def _reason_without_choice(engine: EngineSection) -> str:
    """Return why there is one engine only, as far as the config alone tells."""
    if engine.fixed_rate_tokens_per_s is not None:
        return "engine.fixed_rate_tokens_per_s is set"
    if engine.kind != "auto":
        return f"engine.kind is {engine.kind}"
    if engine.tensor_parallel_size > 1:
        return "it alone spreads a model over several cards"
    return "it alone drafts tokens" if engine.speculative.is_on else "it alone does this"


def _is_openvino_chosen(
    source: ModelSource,
    model: ModelSection,
    engine: EngineSection,
    tell: Callable[[str], None],
    on_choice: Callable[[str], None],
) -> bool:
    if engine.kind != "auto" or engine.tensor_parallel_size > 1 or engine.speculative.is_on:
        return False
    from serve_app.engine.auto import choose_engine

    choice = choose_engine(
        source, model, engine, on_measuring=lambda: tell("measuring the engines")
    )
    on_choice(choice.reason)
    return choice.kind == "openvino"


def _create_native(
    source: ModelSource, model: ModelSection, engine: EngineSection, tell: Callable[[str], None]
) -> Engine:
    from serve_app.engine.devices import resolve_device
    from serve_app.engine.native import NativeEngine
    from serve_app.models.loading.loader import load_model
    from serve_app.models.loading.progress import LoadProgress

    device = resolve_device(engine.device)
    if engine.tensor_parallel_size > 1:
        from serve_app.engine.tensor_parallel import create_parallel_engine

        return create_parallel_engine(source, model, engine, device, tell)
    tell("loading weights")
    started = time.perf_counter()
    loaded = load_model(
        source.path,
        device=device,
        dtype=engine.dtype,
        weight_format=engine.weight_format,
        batch_invariant=engine.batch_invariant,
        progress=LoadProgress(tell),
    )
    load_s = time.perf_counter() - started
    loaded.name = source.name
    tell("warm-up")
    return NativeEngine(
        loaded, engine, max_model_len=model.max_model_len, load_s=load_s, on_progress=tell
    )


def _create_embedding(
    source: ModelSource,
    model: ModelSection,
    engine: EngineSection,
    embedding: EmbeddingConfig,
    tell: Callable[[str], None],
) -> Engine:
    _check_embeds(engine)
    _refuse_speculation(engine, "embedding")
    from serve_app.engine.devices import resolve_device
    from serve_app.engine.embedding import EmbeddingEngine
    from serve_app.models.loading.loader import load_model
    from serve_app.models.loading.progress import LoadProgress

    tell("loading weights")
    started = time.perf_counter()
    loaded = load_model(
        source.path,
        device=resolve_device(engine.device),
        dtype=engine.dtype,
        weight_format=engine.weight_format,
        batch_invariant=engine.batch_invariant,
        progress=LoadProgress(tell),
        has_head=False,
    )
    load_s = time.perf_counter() - started
    loaded.name = source.name
    tell("warm-up")
    longest = model.max_model_len or embedding.max_tokens
    return EmbeddingEngine(
        loaded, engine, embedding, max_model_len=longest, load_s=load_s, on_progress=tell
    )


def _check_embeds(engine: EngineSection) -> None:
    """Raise ConfigError for a setting that only engines which generate know."""
    fixes = {
        "kind": (engine.kind not in ("auto", "native"), "native"),
        "tensor_parallel_size": (engine.tensor_parallel_size > 1, "1"),
        "fixed_rate_tokens_per_s": (engine.fixed_rate_tokens_per_s is not None, "null"),
    }
    for name, (is_wrong, value) in fixes.items():
        if is_wrong:
            raise ConfigError(
                f"engine.{name}: {getattr(engine, name)} does not go with an embedding model; set"
                f" it to {value}, or model.task: generate",
                param=f"engine.{name}",
            )


def _create_transformers(
    source: ModelSource, model: ModelSection, engine: EngineSection, tell: Callable[[str], None]
) -> Engine:
    _require_folder(source, "transformers")
    _refuse_batch_invariance(engine, "transformers")
    _refuse_speculation(engine, "transformers")
    from serve_app.engine.devices import resolve_device, resolve_dtype
    from serve_app.engine.transformers_engine import TransformersEngine, load_transformers_model

    device = resolve_device(engine.device)
    tell("loading weights")
    started = time.perf_counter()
    network = load_transformers_model(
        source.path,
        device,
        resolve_dtype(engine.dtype, device),
        trust_pickle=model.trust_pickle,
    )
    load_s = time.perf_counter() - started
    tell("warm-up")
    return TransformersEngine(
        network, engine, name=source.name, max_model_len=model.max_model_len, load_s=load_s
    )


def _create_ipex(
    source: ModelSource, model: ModelSection, engine: EngineSection, tell: Callable[[str], None]
) -> Engine:
    from serve_app.engine.ipex_runtime import import_ipex

    import_ipex()  # absent is told before anything else is found wrong
    _require_folder(source, "ipex")
    _refuse_batch_invariance(engine, "ipex")
    if engine.device not in ("auto", "cpu"):
        raise ConfigError(
            f"engine.device: the ipex engine runs on CPU, not on {engine.device}, which PyTorch"
            " itself serves; set engine.kind: native",
            param="engine.device",
        )
    from serve_app.engine.devices import resolve_device, resolve_dtype
    from serve_app.engine.ipex_engine import create_ipex_engine

    tell("loading weights")
    return create_ipex_engine(
        source.path,
        engine,
        name=source.name,
        max_model_len=model.max_model_len,
        dtype=resolve_dtype(engine.dtype, resolve_device("cpu")),
        trust_pickle=model.trust_pickle,
    )


def _require_folder(source: ModelSource, kind: str) -> None:
    if source.format is not ModelFormat.HUGGING_FACE:
        raise ConfigError(
            f"engine.kind: the {kind} engine needs a Hugging Face folder, but"
            f" {source.path.name} is a GGUF file; set engine.kind: native",
            param="engine.kind",
        )


def _refuse_batch_invariance(engine: EngineSection, kind: str) -> None:
    if engine.batch_invariant:
        raise ConfigError(
            f"engine.batch_invariant: the {kind} engine cannot promise it; set it to false",
            param="engine.batch_invariant",
        )


def _refuse_speculation(engine: EngineSection, kind: str) -> None:
    if engine.speculative.is_on:
        raise ConfigError(
            f"engine.speculative.method: the {kind} engine has none, and this model runs on no"
            " other; set it to off",
            param="engine.speculative.method",
        )


def _create_openvino(
    source: ModelSource, model: ModelSection, engine: EngineSection, tell: Callable[[str], None]
) -> Engine:
    _refuse_batch_invariance(engine, "openvino")
    from serve_app.engine.openvino_engine import OpenVinoEngine
    from serve_app.engine.openvino_model import prepare_model
    from serve_app.engine.openvino_runtime import openvino_device

    device = openvino_device(engine.device)
    tell("loading weights")
    started = time.perf_counter()
    prepared = prepare_model(source)
    load_s = time.perf_counter() - started
    tell("warm-up")
    return OpenVinoEngine(
        prepared,
        engine,
        device=device,
        name=source.name,
        max_model_len=model.max_model_len,
        load_s=load_s,
    )


def _create_fixed_rate(source: ModelSource, model: ModelSection, engine: EngineSection) -> Engine:
    from serve_app.engine.fixed_rate import FixedRateEngine

    vocab_size, made_for = _read_limits(source)
    return FixedRateEngine(
        engine,
        model=source.name,
        vocab_size=vocab_size,
        max_model_len=min(model.max_model_len or made_for, made_for),
    )


def _read_limits(source: ModelSource) -> tuple[int, int]:
    """Vocabulary size and context length of a model's files, without loading it."""
    if source.format is ModelFormat.HUGGING_FACE:
        config = json.loads((source.path / "config.json").read_text())
        return int(config["vocab_size"]), int(
            config.get("max_position_embeddings", _DEFAULT_MODEL_LEN)
        )
    from serve_app.models.gguf import GGUFFile

    metadata = GGUFFile(source.path).metadata
    architecture = metadata["general.architecture"]
    context = metadata.get(f"{architecture}.context_length", _DEFAULT_MODEL_LEN)
    return len(metadata["tokenizer.ggml.tokens"]), int(context)
