"""Batches at several concurrencies, round by round: the measure that engine and HTTP share.

A batch is `concurrency` sequences that start together. Concurrencies alternate within a round, so a
change of the machine's speed meets all of them alike. Every prompt is new: no prefix is cached. One
short batch of the largest size runs before the first round and does not count.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve_app.bench.load import LoadGenerator, LoadResult, Target
from serve_app.bench.report import format_table, summarise
from serve_app.bench.workloads import WorkloadOptions, make_workload

OnBatch = Callable[[int, int, float], None]
"""Told (round, concurrency, tokens per second) after each batch."""


@dataclass(frozen=True, slots=True)
class RoundOptions:
    """What each round runs: one batch for each of `concurrencies`; `num_rounds` of them."""

    concurrencies: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 128
    output_tokens: int = 64
    num_rounds: int = 3
    seed: int = 0

    def warm_up(self) -> WorkloadOptions:
        """Return what the batch before the first round asks for."""
        largest = max(self.concurrencies)
        return replace(self.workload(-1, largest), output_tokens=min(8, self.output_tokens))

    def workload(self, number: int, concurrency: int) -> WorkloadOptions:
        """Return what the batch of one round asks for."""
        return WorkloadOptions(
            num_requests=concurrency,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            seed=1_000_003 * self.seed + 1_009 * number + concurrency,
        )


def measure_batches(
    target: Target, options: RoundOptions, on_batch: OnBatch = lambda *_: None
) -> list[dict[str, Any]]:
    """Send the batches of `options` to a service; return figures for each concurrency."""
    return asyncio.run(_measure(target, options, on_batch))


async def _measure(
    target: Target, options: RoundOptions, on_batch: OnBatch
) -> list[dict[str, Any]]:
    generator = LoadGenerator(target)
    await generator.run_closed(
        make_workload("fixed", options.warm_up()), max(options.concurrencies)
    )
    results: dict[int, list[LoadResult]] = {c: [] for c in options.concurrencies}
    for number in range(options.num_rounds):
        for concurrency in options.concurrencies:
            specs = make_workload("fixed", options.workload(number, concurrency))
            result = await generator.run_closed(specs, concurrency)
            results[concurrency].append(result)
            on_batch(number, concurrency, summarise(result)["output_throughput"])
    return [merge_batches(concurrency, batches) for concurrency, batches in results.items()]


def merge_batches(concurrency: int, batches: Sequence[LoadResult]) -> dict[str, Any]:
    """Return figures over all batches of one concurrency.

    output_throughput is the median batch's, with min_ and max_; latencies are over all requests.
    """
    whole = LoadResult(
        records=tuple(record for batch in batches for record in batch.records),
        duration_s=sum(batch.duration_s for batch in batches),
        client_cpu_s=sum(batch.client_cpu_s for batch in batches),
        max_in_flight=max(batch.max_in_flight for batch in batches),
    )
    rates = [summarise(batch)["output_throughput"] for batch in batches]
    return {
        **summarise(whole),
        "concurrency": concurrency,
        "output_throughput": statistics.median(rates),
        "min_output_throughput": min(rates),
        "max_output_throughput": max(rates),
        "rounds": rates,
    }


_COLUMNS = {
    "concurrency": "concurrency",
    "tokens/s": "output_throughput",
    "min": "min_output_throughput",
    "max": "max_output_throughput",
    "TTFT ms": "median_ttft_ms",
    "p99 TTFT": "p99_ttft_ms",
    "TPOT ms": "median_tpot_ms",
    "p99 TPOT": "p99_tpot_ms",
    "failed": "failed",
}


def rounds_table(figures: Sequence[dict[str, Any]]) -> str:
    """Return the figures of `merge_batches` as a table; medians where no percentile is named."""
    rows = [[entry[key] for key in _COLUMNS.values()] for entry in figures]
    return format_table(tuple(_COLUMNS), rows)
