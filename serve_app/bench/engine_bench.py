"""The engine alone, in this process: the same batches as over HTTP, nothing above it running."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from serve_app.bench.load import LoadResult, RequestRecord
from serve_app.bench.rounds import OnBatch, RoundOptions, merge_batches
from serve_app.bench.workloads import WorkloadOptions, make_workload
from serve_app.config.schema import AppConfig
from serve_app.core.errors import EngineError
from serve_app.core.events import FinishReason, TokenEvent
from serve_app.core.sampling import SamplingParams
from serve_app.engine.protocol import Engine


def measure_engine(
    app: AppConfig, options: RoundOptions, on_batch: OnBatch = lambda *_: None
) -> dict[str, Any]:
    """Load the engine that `app` names, run the rounds, close it.

    Returns `engine` (figures for each concurrency) and `engine_info` (which engine, device, dtype).
    """
    from serve_app.engine.factory import create_engine

    engine = create_engine(app.model, app.engine)
    try:
        info = engine.info
        return {
            "engine": run_rounds(engine, options, on_batch),
            "engine_info": {
                "engine": info.engine,
                "model": info.model,
                "device": info.device_name,
                "dtype": info.dtype,
                "batch_invariant": info.capabilities.batch_invariant,
                "startup_s": dict(info.startup_s),
            },
        }
    finally:
        engine.close()


def run_rounds(
    engine: Engine, options: RoundOptions, on_batch: OnBatch = lambda *_: None
) -> list[dict[str, Any]]:
    """Run the batches of `options` on `engine`; concurrencies past its limit are left out.

    Raises EngineError where a sequence fails.
    """
    sizes = [size for size in options.concurrencies if size <= engine.info.max_num_seqs]
    results: dict[int, list[LoadResult]] = {size: [] for size in sizes}
    if sizes:
        _run_batch(engine, replace(options, concurrencies=tuple(sizes)).warm_up())
    for number in range(options.num_rounds):
        for size in sizes:
            result = _run_batch(engine, options.workload(number, size))
            results[size].append(result)
            num_tokens = sum(record.num_output_tokens for record in result.records)
            on_batch(number, size, num_tokens / result.duration_s)
    return [merge_batches(size, batches) for size, batches in results.items()]


def _run_batch(engine: Engine, workload: WorkloadOptions) -> LoadResult:
    prompts = [spec.body["prompt"] for spec in make_workload("fixed", workload)]
    return _Batch(engine, prompts, workload.output_tokens).run()


class _Batch:
    """Sequences that are submitted together and stepped to their end."""

    def __init__(self, engine: Engine, prompts: list[list[int]], num_output: int) -> None:
        self._engine = engine
        self._prompts = {f"bench-{index}": prompt for index, prompt in enumerate(prompts)}
        self._sampling = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
        self._records: dict[str, RequestRecord] = {}
        self._last_s: dict[str, float] = {}
        self._num_open = len(prompts)

    def run(self) -> LoadResult:
        begin_s, cpu_s = time.perf_counter(), time.process_time()
        for request_id, prompt in self._prompts.items():
            self._engine.submit(request_id, prompt, self._sampling)
            self._records[request_id] = RequestRecord(
                "engine", begin_s, num_prompt_tokens=len(prompt)
            )
        while self._num_open:
            events = self._engine.step()
            now_s = time.perf_counter()
            for event in events:
                self._take(event, now_s)
        return LoadResult(
            records=tuple(self._records.values()),
            duration_s=time.perf_counter() - begin_s,
            client_cpu_s=time.process_time() - cpu_s,
            max_in_flight=len(self._prompts),
        )

    def _take(self, event: TokenEvent, now_s: float) -> None:
        record = self._records[event.request_id]
        if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORTED):
            reason = event.error.message if event.error else event.finish_reason.value
            raise EngineError(f"the engine failed during the measurement: {reason}")
        if event.new_token_ids:
            if record.ttft_s is None:
                record.ttft_s = now_s - record.sent_at_s
            else:
                record.itls_s.append(now_s - self._last_s[event.request_id])
            self._last_s[event.request_id] = now_s
            record.num_output_tokens += len(event.new_token_ids)
        if event.finish_reason is not None:
            record.e2el_s = now_s - record.sent_at_s
            record.finish_reason = event.finish_reason.value
            self._num_open -= 1
