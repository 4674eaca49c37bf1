"""What everything above the engine costs: the service with an engine that only keeps time."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.bench.load import LoadGenerator, LoadResult, Target
from serve_app.bench.processes import cpu_between
from serve_app.bench.report import summarise
from serve_app.bench.service import Service
from serve_app.bench.workloads import WorkloadOptions, make_workload
from serve_app.core.errors import EngineError

ANY_MODEL = "bench"
INGRESS = "Ingress"


@dataclass(frozen=True, slots=True)
class OverheadOptions:
    """`num_streams` streams at `tokens_per_s` each, for `duration_s` seconds."""

    num_streams: int = 32
    tokens_per_s: float = 30.0
    duration_s: float = 10.0
    num_first_tokens: int = 21
    prompt_tokens: int = 128


def measure_overhead(
    config: Path,
    options: OverheadOptions,
    host: str | None = None,
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Start the service of `config` with the fixed-rate engine; return what it delivers and costs.

    host: where it listens, instead of the config's. overrides: `section.key=value` for its args.

    Keys: offered_throughput and output_throughput (tokens/s), cpu_us_per_token over all processes
    of the service, cpu_s_by_process and cpu_us_per_token_by_process (hop by hop: HAProxy or
    ProxyActor, Ingress, ModelReplica, engine, and what Ray itself takes),
    tokens_per_s_per_ingress_core and streams_per_ingress_replica (how many of this rate an ingress
    replica carries that has a core to itself; both from its CPU per token),
    client_cpu_us_per_token, median_first_token_ms: from the engine's first token to the client's,
    at concurrency 1.
    """
    changes = (
        *overrides,
        'model.aliases=["*"]',
        f"engine.fixed_rate_tokens_per_s={options.tokens_per_s}",
        f"engine.max_num_seqs={options.num_streams}",
    )
    with Service(config, changes, host=host) as service:
        target = Target.from_url(service.url, ANY_MODEL)
        _checked(asyncio.run(_warm_up(target, options)))
        first_token_ms = _first_token_ms(target, options)
        before = service.processes.snapshot()
        result = _checked(asyncio.run(_stream(target, options)))
        cpu_s = cpu_between(before, service.processes.snapshot())
    return _figures(result, cpu_s, first_token_ms, options)


def _figures(
    result: LoadResult, cpu_s: dict[str, float], first_token_ms: float, options: OverheadOptions
) -> dict[str, Any]:
    figures = summarise(result)
    num_tokens = figures["total_output_tokens"]
    us_by_process = {name: 1e6 * spent / num_tokens for name, spent in cpu_s.items()}
    per_core = 1e6 / us_by_process[INGRESS] if us_by_process.get(INGRESS) else None
    return {
        "num_streams": options.num_streams,
        "offered_throughput": options.num_streams * options.tokens_per_s,
        "output_throughput": figures["output_throughput"],
        "cpu_us_per_token": 1e6 * sum(cpu_s.values()) / num_tokens,
        "cpu_s_by_process": cpu_s,
        "cpu_us_per_token_by_process": us_by_process,
        "tokens_per_s_per_ingress_core": per_core,
        "streams_per_ingress_replica": per_core and int(per_core / options.tokens_per_s),
        "client_cpu_us_per_token": figures["client_cpu_us_per_token"],
        "median_first_token_ms": first_token_ms,
        "load": figures,
    }


async def _stream(target: Target, options: OverheadOptions) -> LoadResult:
    workload = WorkloadOptions(
        num_requests=options.num_streams,
        prompt_tokens=options.prompt_tokens,
        output_tokens=round(options.duration_s * options.tokens_per_s),
        seed=1,
    )
    return await LoadGenerator(target).run_closed(
        make_workload("fixed", workload), options.num_streams
    )


async def _warm_up(target: Target, options: OverheadOptions) -> LoadResult:
    workload = WorkloadOptions(options.num_streams, options.prompt_tokens, output_tokens=8, seed=2)
    specs = make_workload("fixed", workload)
    return await LoadGenerator(target).run_closed(specs, options.num_streams)


def _first_token_ms(target: Target, options: OverheadOptions) -> float:
    """Median delay of the first token at concurrency 1, behind the engine's own.

    The idle engine has its first token one period after submission.
    """
    workload = WorkloadOptions(
        options.num_first_tokens, options.prompt_tokens, output_tokens=2, seed=3
    )
    specs = make_workload("fixed", workload)
    result = _checked(asyncio.run(LoadGenerator(target).run_closed(specs, 1)))
    period_ms = 1e3 / options.tokens_per_s
    times_ms = [1e3 * record.ttft_s for record in result.records if record.ttft_s is not None]
    return statistics.median(times_ms) - period_ms


def _checked(result: LoadResult) -> LoadResult:
    errors = sorted({record.error for record in result.records if record.error})
    if errors:
        raise EngineError(f"the measurement failed: {'; '.join(errors[:3])}")
    return result
