"""The deterministic part of a baseline: what the engine does, counted; equal on every machine."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

from serve_app.bench.baseline_network import checksum_model
from serve_app.config.schema import EngineSection
from serve_app.core.errors import EngineError
from serve_app.core.events import FinishReason
from serve_app.core.sampling import SamplingParams
from serve_app.engine.native import NativeEngine

_COUNTED = (
    "num_steps_total",
    "num_scheduled_tokens_total",
    "num_prompt_tokens_total",
    "num_generation_tokens_total",
    "num_preemptions_total",
    "num_joins_total",
    "num_chunked_prefills_total",
    "num_aborted_total",
    "num_prefix_queries_tokens_total",
    "num_prefix_hit_tokens_total",
    "max_num_running",
)
_NUM_REQUESTS = 32
_NUM_PREFIXES = 3
_PREFIX_TOKENS = 48
_STEPS_BETWEEN = 3
_ABORTED = ("r5", "r17")
_ABORT_STEP = 60
_MAX_STEPS = 5_000
_SECTION = EngineSection(
    device="cpu",
    block_size=16,
    kv_cache_tokens=512,  # too little for all that may run: some are preempted
    max_num_seqs=8,
    max_num_batched_tokens=64,
    warmup=False,
    num_threads=1,
)


def measure_counters() -> dict[str, Any]:
    """Run a fixed script of arrivals on the native engine; return its counters and `output_ids`.

    Prefixes are shared, prefills chunked, sequences preempted and aborted. `output_ids` is the
    SHA-256 of every request's ids. Raises EngineError where a request fails or the run hangs.
    """
    engine = NativeEngine(checksum_model(), _SECTION, max_model_len=256)
    waiting = _requests()
    outputs: dict[str, list[int]] = {request_id: [] for request_id, _, _ in waiting}
    open_ids = set(outputs)
    try:
        for step in range(_MAX_STEPS):
            if waiting and step % _STEPS_BETWEEN == 0:
                request_id, prompt, num_output = waiting.pop(0)
                sampling = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
                engine.submit(request_id, prompt, sampling)
            if step == _ABORT_STEP:
                for request_id in _ABORTED:
                    engine.abort(request_id)
            for event in engine.step():
                outputs[event.request_id] += event.new_token_ids
                if event.finish_reason is FinishReason.ERROR:
                    raise EngineError("a request of the deterministic run failed")
                if event.finish_reason is not None:
                    open_ids.discard(event.request_id)
            if not open_ids:
                return _figures(engine, outputs)
        raise EngineError(f"the deterministic run did not end within {_MAX_STEPS} steps")
    finally:
        engine.close()


def _figures(engine: NativeEngine, outputs: dict[str, list[int]]) -> dict[str, Any]:
    stats = engine.stats()
    kept = {request_id: ids for request_id, ids in outputs.items() if request_id not in _ABORTED}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    figures: dict[str, Any] = {name: getattr(stats, name) for name in _COUNTED}
    figures["output_ids"] = hashlib.sha256(text.encode()).hexdigest()
    return figures


def _requests() -> list[tuple[str, list[int], int]]:
    """Return (id, prompt, output tokens) in order of arrival."""
    rng = random.Random("baseline")
    prefixes = [_ids(rng, _PREFIX_TOKENS) for _ in range(_NUM_PREFIXES)]
    requests = []
    for index in range(_NUM_REQUESTS):
        prefix = prefixes[index % _NUM_PREFIXES] if index % 4 else []
        prompt = [*prefix, *_ids(rng, rng.randint(5, 90))]
        requests.append((f"r{index}", prompt, rng.randint(10, 70)))
    return requests


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(512) for _ in range(count)]
