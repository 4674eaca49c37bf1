"""The speeds that XeRay promises on two cores with the embedded model; whether a run keeps them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ENGINE_FLOOR = {1: 28.0, 8: 85.0, 32: 110.0}
"""Concurrency → output tokens/s of the engine alone: 128 prompt tokens, prefill included."""

HTTP_SHARE_FLOOR = 0.85
HTTP_SHARE_CONCURRENCY = 32
DELIVERED_SHARE_FLOOR = 900 / 960
CPU_LIMIT_US = {"python": 1300.0, "haproxy": 450.0}
"""Proxy mode → CPU per token over all processes of the service, in µs."""

FIRST_TOKEN_LIMIT_MS = 40.0

HTTP_SHARE_AIM = 0.90
CPU_AIM_US = 250.0
FIRST_TOKEN_AIM_MS = 10.0
"""Stricter aims for the layers above the engine, told beside the floors."""


@dataclass(frozen=True, slots=True)
class FloorLine:
    """One promise: `value` has to be at least (or, `is_limit`, at most) `bound`."""

    name: str
    value: float
    bound: float
    unit: str
    is_limit: bool = False

    @property
    def is_held(self) -> bool:
        """Whether the run keeps it."""
        return self.value <= self.bound if self.is_limit else self.value >= self.bound

    def __str__(self) -> str:
        sign = "≤" if self.is_limit else "≥"
        verdict = "holds" if self.is_held else "DOES NOT HOLD"
        return f"{self.name}: {self.value:,.1f} {self.unit} ({sign} {self.bound:,.1f}): {verdict}"

    def to_dict(self) -> dict[str, Any]:
        """Return the line as plain values."""
        return {
            "name": self.name,
            "value": self.value,
            "bound": self.bound,
            "unit": self.unit,
            "is_limit": self.is_limit,
            "is_held": self.is_held,
        }


def engine_lines(figures: Sequence[dict[str, Any]], name: str = "engine alone") -> list[FloorLine]:
    """Return a line for each concurrency that has a floor."""
    return [
        FloorLine(f"{name} at {c}", entry["output_throughput"], ENGINE_FLOOR[c], "tokens/s")
        for entry in figures
        if (c := entry["concurrency"]) in ENGINE_FLOOR
    ]


def http_share_line(
    engine: Sequence[dict[str, Any]], http: Sequence[dict[str, Any]]
) -> FloorLine | None:
    """Return HTTP's share of the engine's speed, if both ran at that concurrency.

    Medians over the rounds of all figures: an engine that is measured before and after the service
    meets a processor whose clock changes as the service does.
    """
    at = HTTP_SHARE_CONCURRENCY
    alone = [rate for e in engine if e["concurrency"] == at for rate in e["rounds"]]
    served = [rate for e in http if e["concurrency"] == at for rate in e["rounds"]]
    if not alone or not served:
        return None
    share = 100 * statistics.median(served) / statistics.median(alone)
    return FloorLine(f"HTTP at {at} of the engine alone", share, 100 * HTTP_SHARE_FLOOR, "%")


def http_aim_line(
    engine: Sequence[dict[str, Any]], http: Sequence[dict[str, Any]]
) -> FloorLine | None:
    """Return the aim for HTTP's share of the engine's speed, if both ran at that concurrency."""
    floor = http_share_line(engine, http)
    if floor is None:
        return None
    return FloorLine(f"aim: {floor.name}", floor.value, 100 * HTTP_SHARE_AIM, "%")


def overhead_lines(figures: dict[str, Any]) -> list[FloorLine]:
    """Return what was delivered, its CPU per token, the first token's delay, and the aims.

    The limit of the CPU is that of the proxy which was seen at work.
    """
    proxy = "haproxy" if "haproxy" in figures["cpu_s_by_process"] else "python"
    bound = DELIVERED_SHARE_FLOOR * figures["offered_throughput"]
    cpu, first = figures["cpu_us_per_token"], figures["median_first_token_ms"]
    return [
        FloorLine("delivered", figures["output_throughput"], bound, "tokens/s"),
        FloorLine(f"CPU per token ({proxy} proxy)", cpu, CPU_LIMIT_US[proxy], "µs", is_limit=True),
        FloorLine("first token", first, FIRST_TOKEN_LIMIT_MS, "ms", is_limit=True),
        FloorLine("aim: CPU per token", cpu, CPU_AIM_US, "µs", is_limit=True),
        FloorLine("aim: first token", first, FIRST_TOKEN_AIM_MS, "ms", is_limit=True),
    ]
