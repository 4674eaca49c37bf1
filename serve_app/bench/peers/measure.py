"""Batches in turn through all contestants: what changes the machine's speed meets them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from serve_app.bench.peers.contestant import Contestant, Figures
from serve_app.bench.report import format_table
from serve_app.bench.rounds import RoundOptions
from serve_app.bench.workloads import make_workload
from serve_app.core.errors import XeRayError

OnLine = Callable[[str], None]
HEADERS = (
    "contestant",
    "× at once",
    "decode/s",
    "min",
    "max",
    "prefill/s",
    "TTFT ms",
    "peak MiB",
    "decode ÷ ours",
    "prefill ÷ ours",
)


def run_rounds(
    contestants: Sequence[Contestant], options: RoundOptions, on_line: OnLine
) -> dict[str, dict[int, list[Figures]]]:
    """Return name → concurrency → a batch's figures per round.

    A contestant that fails is told in one line and left out from then on; the others go on. Ctrl-C
    ends the rounds: what was measured before stays.
    """
    results: dict[str, dict[int, list[Figures]]] = {c.name: {} for c in contestants}
    playing = list(contestants)

    def run(number: int, size: int, num_output: int, contestant: Contestant) -> Figures | None:
        specs = make_workload("fixed", options.workload(number, size))
        try:
            return contestant.run(specs, num_output)
        except XeRayError as error:
            on_line(f"{error.message}; it is left out")
            playing.remove(contestant)
            return None

    try:
        for contestant in list(playing):
            run(-1, max(options.concurrencies), min(8, options.output_tokens), contestant)
        for number in range(options.num_rounds):
            for size in options.concurrencies:
                for contestant in list(playing):
                    figures = run(number, size, options.output_tokens, contestant)
                    if figures is None:
                        continue
                    results[contestant.name].setdefault(size, []).append(figures)
                    on_line(
                        f"  round {number + 1}, {size} × {contestant.name}: decode"
                        f" {figures.decode:.1f}, prefill {figures.prefill:.0f} tokens/s"
                    )
    except KeyboardInterrupt:
        on_line("cut short: the table has what was measured until here")
    return results


def summarise_rounds(
    results: dict[str, dict[int, list[Figures]]], ours: str
) -> list[dict[str, Any]]:
    """Return one entry per contestant and concurrency: medians, spread, and ratios to `ours`.

    A ratio is the median over the rounds of this round's figure over ours in the same round; None
    where ours is missing.
    """
    entries = []
    sizes = sorted({size for by_size in results.values() for size in by_size})
    for size in sizes:
        base = results.get(ours, {}).get(size, [])
        for name, by_size in results.items():
            rounds = by_size.get(size)
            if not rounds:
                continue
            decodes = [figures.decode for figures in rounds]
            entries.append(
                {
                    "contestant": name,
                    "concurrency": size,
                    "decode": statistics.median(decodes),
                    "min_decode": min(decodes),
                    "max_decode": max(decodes),
                    "prefill": statistics.median(figures.prefill for figures in rounds),
                    "ttft_s": statistics.median(figures.ttft_s for figures in rounds),
                    "peak_bytes": max(figures.peak_bytes for figures in rounds),
                    "decode_ratio": _ratio(rounds, base, "decode"),
                    "prefill_ratio": _ratio(rounds, base, "prefill"),
                    "rounds": [asdict(figures) for figures in rounds],
                }
            )
    return entries


def _ratio(rounds: Sequence[Figures], base: Sequence[Figures], key: str) -> float | None:
    pairs = [(getattr(a, key), getattr(b, key)) for a, b in zip(rounds, base, strict=False)]
    ratios = [mine / ours for mine, ours in pairs if ours > 0]
    return statistics.median(ratios) if ratios else None


def peers_table(entries: Sequence[dict[str, Any]]) -> str:
    """Return the entries of `summarise_rounds` as a table."""
    return format_table(HEADERS, [_row(entry) for entry in entries])


def _row(entry: dict[str, Any]) -> list[object]:
    ratios = (entry["decode_ratio"], entry["prefill_ratio"])
    return [
        entry["contestant"],
        entry["concurrency"],
        entry["decode"],
        entry["min_decode"],
        entry["max_decode"],
        entry["prefill"],
        1e3 * entry["ttft_s"],
        entry["peak_bytes"] / 2**20,
        *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
    ]
