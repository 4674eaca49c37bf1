"""OpenVINO beside the native engine on one model: equal answers, and decode speed, in seconds."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve_app.config.model_source import ModelSource
from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.errors import EngineError
from serve_app.core.events import TokenEvent
from serve_app.core.sampling import SamplingParams
from serve_app.engine.auto import Measurement
from serve_app.engine.devices import resolve_device
from serve_app.engine.native import NativeEngine
from serve_app.engine.openvino_engine import OpenVinoEngine
from serve_app.engine.openvino_model import OpenVinoModel, prepare_model
from serve_app.engine.openvino_runtime import import_openvino, openvino_device
from serve_app.engine.openvino_settings import plugin_properties
from serve_app.engine.protocol import Engine
from serve_app.hardware.memory import available_memory_bytes
from serve_app.models.loading.loader import load_model

_NUM_TEXTS = 8
_TEXT_TOKENS = 96
_SIZES = (1, 8)
_PROMPT_TOKENS = 64
_OUTPUT_TOKENS = 24
_NUM_ROUNDS = 2
_REFERENCE_SHARE = 0.5
"""Of free memory that the reference's dense float32 weights may take; else it is the engine."""


@dataclass(frozen=True, slots=True)
class _Text:
    """Ids, and for each place after the first the reference's best id and the id's logprob."""

    ids: tuple[int, ...]
    best_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def measure_openvino(
    source: ModelSource, model: ModelSection, section: EngineSection
) -> Measurement:
    """Run both engines on `source`. Raises ConfigError or EngineError where one of them cannot."""
    prepared = prepare_model(source)
    small = section.model_copy(
        update={
            "kv_cache_tokens": max(_SIZES) * (_PROMPT_TOKENS + _OUTPUT_TOKENS + 64) + 2048,
            "max_num_seqs": max(_SIZES),
            "enable_prefix_caching": False,
            "warmup": False,
        }
    )
    texts = _reference_texts(source, small, prepared)
    agreement, perplexity_ratio = _compare(prepared, small, texts)
    rates = [_rates(engine) for engine in _engines(source, small, prepared)]
    ratios = [theirs / ours for ours, theirs in zip(*rates, strict=True)]
    speedup = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return Measurement(agreement, perplexity_ratio, speedup)


def _reference_texts(
    source: ModelSource, section: EngineSection, prepared: OpenVinoModel
) -> list[_Text]:
    """Texts that the model itself writes, and what it says about them in float32."""
    config = prepared.config
    wide = config.hidden_size + config.intermediate_size
    inner = config.num_layers * config.hidden_size * 4 * wide
    dense_bytes = 4 * (inner + 2 * config.vocab_size * config.hidden_size)
    fits = dense_bytes < _REFERENCE_SHARE * available_memory_bytes()
    device = resolve_device("cpu")
    loaded = (
        load_model(source.path, device=device, dtype="float32", weight_format="dense")
        if fits
        else load_model(source.path, device=device)
    )
    engine = NativeEngine(loaded, section, max_model_len=2 * _TEXT_TOKENS)
    try:
        rng = random.Random(0)
        starts = [(rng.randrange(config.vocab_size // 2),) for _ in range(_NUM_TEXTS)]
        wanted = SamplingParams(max_tokens=_TEXT_TOKENS - 1, temperature=0.8)
        texts = [
            start + _ids(events)
            for start, events in zip(starts, _run(engine, starts, wanted), strict=True)
        ]
        scored = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
        return [
            _text(ids, events)
            for ids, events in zip(texts, _run(engine, texts, scored), strict=True)
        ]
    finally:
        engine.close()


def _text(ids: tuple[int, ...], events: list[TokenEvent]) -> _Text:
    entries = [entry for entry in events[0].prompt_logprobs or () if entry is not None]
    assert len(entries) == len(ids) - 1, "the reference reports every id but the first"
    best_ids = tuple(entry.top[0][0] for entry in entries)
    return _Text(ids, best_ids, tuple(entry.logprob for entry in entries))


def _compare(
    prepared: OpenVinoModel, section: EngineSection, texts: list[_Text]
) -> tuple[float, float]:
    """Return (agreement, perplexity over the reference's) of the IR under the engine's settings."""
    openvino, _ = import_openvino()
    device = openvino_device(section.device)
    core = openvino.Core()
    network = core.compile_model(
        core.read_model(prepared.folder / "openvino_model.xml"),
        device,
        plugin_properties(section, device),
    )
    num_equal = num_places = 0
    difference = 0.0
    for text in texts:
        logprobs = _logprobs(network, text.ids)[:-1]
        best_ids = logprobs.argmax(-1)
        num_equal += int((best_ids == np.array(text.best_ids)).sum())
        num_places += len(best_ids)
        of_ids = logprobs[np.arange(len(best_ids)), np.array(text.ids[1:])]
        difference += float((np.array(text.logprobs) - of_ids).sum())
    return num_equal / num_places, math.exp(difference / num_places)


def _logprobs(network: Any, ids: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Log-softmax [T, V] of one sequence, its key/value state empty before."""
    request = network.create_infer_request()
    length = len(ids)
    values = {
        "input_ids": np.array([ids], dtype=np.int64),
        "attention_mask": np.ones((1, length), dtype=np.int64),
        "position_ids": np.arange(length, dtype=np.int64)[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }
    known = {name for port in network.inputs for name in port.get_names()}
    result = request.infer({name: value for name, value in values.items() if name in known})
    logits = np.asarray(result[network.output(0)][0], dtype=np.float64)
    logits -= logits.max(-1, keepdims=True)
    shifted: np.ndarray[Any, np.dtype[np.float64]] = logits - np.log(
        np.exp(logits).sum(-1, keepdims=True)
    )
    return shifted


def _engines(source: ModelSource, section: EngineSection, prepared: OpenVinoModel) -> Any:
    """Yield the native engine, then OpenVINO's; each is closed before the next is made."""
    device = resolve_device("cpu")
    loaded = load_model(
        source.path, device=device, dtype=section.dtype, weight_format=section.weight_format
    )
    engine: Engine = NativeEngine(loaded, section)
    yield engine
    engine.close()
    del loaded
    engine = OpenVinoEngine(
        prepared, section, device=openvino_device(section.device), name=source.name
    )
    yield engine
    engine.close()


def _rates(engine: Engine) -> list[float]:
    """Decode tokens/s for each of `_SIZES`: the better of two rounds after one that warms up."""
    rates = []
    for size in _SIZES:
        best = max(_decode_rate(engine, size, number) for number in range(_NUM_ROUNDS + 1))
        rates.append(best)
    return rates


def _decode_rate(engine: Engine, size: int, number: int) -> float:
    rng = random.Random(f"{size} {number}")
    limit = engine.info.vocab_size
    for index in range(size):
        prompt = [rng.randrange(limit) for _ in range(_PROMPT_TOKENS)]
        sampling = SamplingParams(max_tokens=_OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
        engine.submit(f"measure-{index}", prompt, sampling)
    waiting = {f"measure-{index}" for index in range(size)}
    num_decoded, started = 0, time.perf_counter()
    while engine.has_work():
        events = engine.step()
        if waiting:
            waiting.difference_update(event.request_id for event in events if event.new_token_ids)
            started = time.perf_counter()
            continue
        num_decoded += sum(len(event.new_token_ids) for event in events)
    return num_decoded / (time.perf_counter() - started)


def _run(
    engine: Engine, prompts: Sequence[tuple[int, ...]], sampling: SamplingParams
) -> list[list[TokenEvent]]:
    """Return the events of each prompt. Raises EngineError where one fails."""
    events: dict[str, list[TokenEvent]] = {f"text-{index}": [] for index in range(len(prompts))}
    for name, prompt in zip(events, prompts, strict=True):
        engine.submit(name, prompt, sampling)
    while engine.has_work():
        for event in engine.step():
            if event.error is not None:
                raise EngineError(event.error.message)
            events[event.request_id].append(event)
    return list(events.values())


def _ids(events: list[TokenEvent]) -> tuple[int, ...]:
    return tuple(token_id for event in events for token_id in event.new_token_ids)
