"""One run of `xeray bench isa`: ``python -m serve_app.bench.isa_worker SHAPE ROWS PROMPT STEPS``.

The native engine in bfloat16 with random weights reads prompts, then decodes. oneDNN's log goes to
the same output as the lines that tell the phases, so each product falls into its phase.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from serve_app.bench.decode_shapes import SHAPES
from serve_app.bench.isa_worker_lines import PHASE, RESULT
from serve_app.config.schema import EngineSection
from serve_app.core.sampling import SamplingParams
from serve_app.engine.devices import pin_threads
from serve_app.engine.native import NativeEngine
from serve_app.models.loading.random_source import make_random_model

_NUM_LAYERS = 4
"""All layers use the same products: a few tell as much as all, and start sooner."""


def main() -> None:
    """Run both phases; the last line has their seconds and tokens."""
    shape, rows, prompt_len, num_steps = sys.argv[1], *map(int, sys.argv[2:5])
    threads = pin_threads(None, None)
    config = replace(SHAPES[shape], num_layers=_NUM_LAYERS)
    model = make_random_model(config, device=torch.device("cpu"), dtype="bfloat16")
    longest = prompt_len + num_steps + 1
    section = EngineSection(
        kv_cache_tokens=rows * (longest + 16),
        max_num_seqs=rows,
        max_num_batched_tokens=rows * prompt_len,
        enable_prefix_caching=False,
    )
    engine = NativeEngine(model, section, max_model_len=longest)
    # The first prompts and steps of each size pay for what oneDNN compiles and lays out once.
    _run_batch(engine, rows, prompt_len, num_steps, lambda phase: None)
    prefill_s, decode_s, num_decoded = _run_batch(engine, rows, prompt_len, num_steps, _say)
    result = {
        "threads": threads,
        "prefill_tokens_per_s": rows * prompt_len / prefill_s,
        "decode_tokens_per_s": num_decoded / decode_s,
    }
    print(RESULT + json.dumps(result), flush=True)
    engine.close()


def _run_batch(
    engine: NativeEngine, rows: int, prompt_len: int, num_steps: int, say: Callable[[str], None]
) -> tuple[float, float, int]:
    """Seconds until each sequence has its first token, seconds from then on, tokens in these."""
    params = SamplingParams(temperature=0.0, max_tokens=num_steps + 1, ignore_eos=True)
    say("prefill")
    started = time.perf_counter()
    waiting = {str(row) for row in range(rows)}
    for row in range(rows):
        engine.submit(str(row), [3 + (7 * row + i) % 1000 for i in range(prompt_len)], params)
    while waiting:
        waiting -= {event.request_id for event in engine.step()}
    prefill_s = time.perf_counter() - started
    before = engine.stats().num_generation_tokens_total
    say("decode")
    started = time.perf_counter()
    while engine.has_work():
        engine.step()
    decode_s = time.perf_counter() - started
    say("end")
    return prefill_s, decode_s, engine.stats().num_generation_tokens_total - before


def _say(phase: str) -> None:
    print(PHASE + phase, flush=True)


if __name__ == "__main__":
    main()
