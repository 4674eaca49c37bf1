"""llama.cpp through llama-cpp-python's low-level batch API: n sequences in one context.

That is what llama-server does: each call of `llama_decode` takes one token of every sequence that
generates, and fills the rest of `n_batch` with prompt tokens of those that do not yet.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp as lib
import numpy as np
from loop import Run, RunnerOptions, Times, serve

_BATCH_TOKENS = 2048
"""llama-server's `--batch-size`."""


def _quiet(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Drop the library's log."""


_LOG = lib.llama_log_callback(_quiet)


def start(options: RunnerOptions) -> tuple[dict[str, Any], Run]:
    """Load the .gguf file into a context of `max_num_seqs` sequences."""
    lib.llama_log_set(_LOG, ctypes.c_void_p(0))
    lib.llama_backend_init()
    model_params = lib.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(options.model.encode(), model_params)
    if model is None:
        raise RuntimeError(f"llama.cpp cannot load {options.model}")
    params = lib.llama_context_default_params()
    params.n_ctx = options.max_num_seqs * options.max_model_len
    params.n_seq_max = options.max_num_seqs
    params.n_batch = _BATCH_TOKENS
    params.n_threads = params.n_threads_batch = options.num_threads
    for name, value in options.settings.items():
        setattr(params, name, value)
    context = lib.llama_init_from_model(model, params)
    if context is None:
        raise RuntimeError("llama.cpp cannot make a context")
    engine = _Engine(context, lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)))
    return {"version": lib.__version__, "settings": options.settings}, engine.run


class _Engine:
    """One context and one batch that is filled anew for each step."""

    def __init__(self, context: Any, vocab_size: int) -> None:
        self._context = context
        self._vocab_size = vocab_size
        self._batch = lib.llama_batch_init(_BATCH_TOKENS, 0, 1)

    def run(self, prompts: list[list[int]], num_output: int) -> Times:
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        begin_s = time.perf_counter()
        times: Times = [[] for _ in prompts]
        num_read = [0] * len(prompts)  # tokens of each prompt that are in the cache
        last_ids = [0] * len(prompts)
        while any(len(row) < num_output for row in times):
            sampled = self._fill(prompts, num_output, times, num_read, last_ids)
            if lib.llama_decode(self._context, self._batch) != 0:
                raise RuntimeError("llama_decode failed")
            ids = self._best_ids(len(sampled))
            now_s = time.perf_counter() - begin_s
            for sequence, token_id in zip(sampled, ids, strict=True):
                last_ids[sequence] = token_id
                times[sequence].append(now_s)
        return times

    def _fill(
        self,
        prompts: list[list[int]],
        num_output: int,
        times: Times,
        num_read: list[int],
        last_ids: list[int],
    ) -> list[int]:
        """Write the step's tokens; returns the sequences that get a token, in the batch's order."""
        self._batch.n_tokens = 0
        sampled = []
        for sequence, row in enumerate(times):
            if row and len(row) < num_output:
                place = len(prompts[sequence]) + len(row) - 1
                self._add(last_ids[sequence], place, sequence, True)
                sampled.append(sequence)
        for sequence, prompt in enumerate(prompts):
            start = num_read[sequence]
            end = min(len(prompt), start + _BATCH_TOKENS - self._batch.n_tokens)
            for place in range(start, end):
                self._add(prompt[place], place, sequence, place == len(prompt) - 1)
            num_read[sequence] = max(start, end)
            if start < end == len(prompt):
                sampled.append(sequence)
        return sampled

    def _add(self, token_id: int, place: int, sequence: int, has_logits: bool) -> None:
        batch, index = self._batch, self._batch.n_tokens
        batch.token[index] = token_id
        batch.pos[index] = place
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = has_logits
        batch.n_tokens = index + 1

    def _best_ids(self, num_rows: int) -> list[int]:
        logits = lib.llama_get_logits(self._context)
        rows = np.ctypeslib.as_array(logits, shape=(num_rows, self._vocab_size))
        return [int(token_id) for token_id in rows.argmax(axis=1)]


if __name__ == "__main__":
    serve(start)
