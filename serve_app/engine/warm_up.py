"""What an engine does before it is ready: every bucket run once, and the token budget measured."""

from __future__ import annotations

import time
from collections.abc import Callable

from serve_app.config.schema import EngineSection
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.sizing import LARGEST_BUDGET, measure_budget

_UNMEASURED_BUDGET = {"cpu": 256}
_DEFAULT_BUDGET = 2048

Progress = Callable[[str], None]
"""Told the name of each stage."""


def warm_up(
    runner: ModelRunner,
    section: EngineSection,
    *,
    longest_chunk: int | None,
    on_progress: Progress,
) -> int:
    """Run every bucket once, and return the token budget: given, measured, or the default.

    Raises ConfigError for a model whose logits are not finite.
    """
    given = section.max_num_batched_tokens
    if not section.warmup:
        return given or _UNMEASURED_BUDGET.get(runner.device.type, _DEFAULT_BUDGET)
    runner.check_finite()
    for stage in runner.warm_up():
        on_progress(stage)
    longest = min(runner.config.max_model_len, longest_chunk or LARGEST_BUDGET)
    if given is not None:
        runner.run_dummy_prefill(given, longest)
        return given
    on_progress("token budget")
    started = time.perf_counter()
    runner.run_dummy_decodes(section.max_num_seqs)
    # Two dummy steps ran: one greedy, one random.
    decode_step_s = (time.perf_counter() - started) / 2
    prefill_tokens = measure_budget(
        lambda num_tokens: runner.run_dummy_prefill(num_tokens, longest),
        largest=LARGEST_BUDGET,
        decode_step_s=decode_step_s,
    )
    # Measured beside a full decode step, whose rows count towards the budget too.
    return prefill_tokens + section.max_num_seqs
