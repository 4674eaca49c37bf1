"""Figures of a run, under the names that vLLM's benchmark gives them, as JSON and as a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from serve_app.bench.goodput import Slo
from serve_app.bench.load import LoadResult

PERCENTILES = (50, 90, 95, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile by linear interpolation between closest ranks; NaN without values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def summarise(result: LoadResult, slo: Slo | None = None) -> dict[str, Any]:
    """Return the figures of `result`: counts, throughputs per second, latencies in milliseconds.

    Latencies are those of the requests that succeeded. Keys: mean_, median_, std_ and p50_ … p99_
    of ttft_ms, tpot_ms, itl_ms and e2el_ms; with `slo` also request_goodput (requests per second
    that met it) and slo_met (their share of all that were sent).
    """
    good = [record for record in result.records if record.error is None]
    num_input = sum(record.num_prompt_tokens for record in good)
    num_output = sum(record.num_output_tokens for record in good)
    duration_s = max(result.duration_s, 1e-9)
    figures: dict[str, Any] = {
        "duration": result.duration_s,
        "completed": len(good),
        "failed": len(result.records) - len(good),
        "errors": sorted({record.error for record in result.records if record.error}),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / duration_s,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "max_concurrent_requests": result.max_in_flight,
        "client_cpu_us_per_token": 1e6 * result.client_cpu_s / max(num_output, 1),
        "client_cpu_share": result.client_cpu_s / duration_s,
        "num_unsent": result.num_unsent,
        "is_cut": result.is_cut,
    }
    if slo is not None:
        num_met = sum(map(slo.is_met, result.records))
        figures["slo"] = slo.to_dict()
        figures["request_goodput"] = num_met / duration_s
        figures["slo_met"] = num_met / max(len(result.records), 1)
    latencies = {
        "ttft": [r.ttft_s for r in good if r.ttft_s is not None],
        "tpot": [r.tpot_s for r in good if r.tpot_s is not None],
        "itl": [itl_s for r in good for itl_s in r.itls_s],
        "e2el": [r.e2el_s for r in good],
    }
    for name, values_s in latencies.items():
        figures |= _latency_figures(name, [1e3 * value_s for value_s in values_s])
    return figures


def _latency_figures(name: str, values_ms: list[float]) -> dict[str, float]:
    figures = {
        f"mean_{name}_ms": statistics.fmean(values_ms) if values_ms else math.nan,
        f"median_{name}_ms": percentile(values_ms, 50),
        f"std_{name}_ms": statistics.pstdev(values_ms) if values_ms else math.nan,
    }
    figures |= {f"p{p}_{name}_ms": percentile(values_ms, p) for p in PERCENTILES}
    return figures


def to_json_values(value: Any) -> Any:
    """Replace NaN, which JSON lacks, by None throughout."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: to_json_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_values(inner) for inner in value]
    return value


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return an aligned table: the first column to the left, the others to the right."""
    cells = [list(headers), *([_format(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    lines = ["  ".join(_pad(row, widths)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _pad(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = row
    padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
    return [first.ljust(widths[0]), *padded]


def _format(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:,.1f}"
    return str(value)


_LOAD_COLUMNS = {
    "requests": "completed",
    "failed": "failed",
    "requests/s": "request_throughput",
    "tokens/s": "output_throughput",
    "TTFT ms": "median_ttft_ms",
    "p90 TTFT": "p90_ttft_ms",
    "p99 TTFT": "p99_ttft_ms",
    "TPOT ms": "median_tpot_ms",
    "p90 TPOT": "p90_tpot_ms",
    "p99 TPOT": "p99_tpot_ms",
    "p99 ITL": "p99_itl_ms",
    "p99 E2EL": "p99_e2el_ms",
    "client µs/token": "client_cpu_us_per_token",
}


def load_table(loads: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each load (`summarise` and its `load` label); medians unless named."""
    columns = dict(_LOAD_COLUMNS)
    if any("request_goodput" in figures for figures in loads):
        columns["goodput/s"] = "request_goodput"
    rows = [[f["load"], *(f[key] for key in columns.values())] for f in loads]
    return format_table(("load", *columns), rows)
