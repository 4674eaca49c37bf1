"""Dynamic precision: which of a model's loadable variants takes the next request.

Variants are one model in different widths, widest first. The widest that fits the memory serves as
long as there is room; pressure moves the choice one step narrower, calm one step back::

    pressure = max(KV cache in use, sequences waiting or running / max_num_seqs)

    narrower   pressure ≥ high for the whole of `patience_s`
    wider      pressure ≤ low for the whole of `patience_s`, and the wider one fits the memory
    long prompt   a prompt of `long_prompt_tokens` or more goes to the narrowest for itself

Between `low` and `high` nothing changes, so that load near one limit does not make it swing. A
request keeps its variant to its end: a switch concerns those that come after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge

from serve_app.core.clock import Clock, MonotonicClock
from serve_app.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Variant:
    """One width of the model. `memory_bytes`: weights and the least KV cache that it works with."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica reports now. Shares of 1; `num_sequences` counts waiting and running ones."""

    kv_cache_usage: float
    num_sequences: int
    max_num_seqs: int
    free_memory_bytes: int

    @property
    def pressure(self) -> float:
        """The scarcer of the two; above 1 where sequences wait."""
        return max(self.kv_cache_usage, self.num_sequences / self.max_num_seqs)


@dataclass(frozen=True, slots=True)
class PrecisionLimits:
    """When the choice moves; see the module."""

    low: float = 0.4
    high: float = 0.9
    patience_s: float = 10.0
    long_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ConfigError(
                f"precision: low ({self.low}) must be below high ({self.high})", param="precision"
            )
        if self.patience_s < 0:
            raise ConfigError("precision: patience_s is below 0", param="precision")


class PrecisionPolicy:
    """Chooses a variant per request. `variants` are widest first, of at least one.

    Metrics: gauge `xeray_precision_active` by variant (1 for the one in use) and counters
    `xeray_precision_switches` and `xeray_precision_requests` by variant. Not for several threads.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        limits: PrecisionLimits | None = None,
        *,
        clock: Clock | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        sizes = [variant.memory_bytes for variant in variants]
        if not variants or sizes != sorted(sizes, reverse=True):
            raise ConfigError(
                "precision: name at least one variant, the widest first", param="precision"
            )
        if len({variant.name for variant in variants}) < len(variants):
            raise ConfigError("precision: two variants have one name", param="precision")
        self._variants = tuple(variants)
        self._limits = limits or PrecisionLimits()
        self._clock = clock or MonotonicClock()
        self._index = 0
        self._since: dict[str, float] = {}
        registry = registry or CollectorRegistry()
        self._active = Gauge(
            "xeray_precision_active", "1 for the variant in use", ["variant"], registry=registry
        )
        self._switches = Counter(
            "xeray_precision_switches", "Changes to a variant", ["variant"], registry=registry
        )
        self._requests = Counter(
            "xeray_precision_requests", "Requests by variant", ["variant"], registry=registry
        )
        self._show()

    @property
    def active(self) -> Variant:
        """The variant that ordinary requests go to now."""
        return self._variants[self._index]

    def observe(self, load: Load) -> Variant:
        """Take in a report of the active variant's replica; return the variant after it."""
        now_s = self._clock.now()
        is_last = self._index == len(self._variants) - 1
        is_scarce = not is_last and load.pressure >= self._limits.high
        is_calm = self._index > 0 and load.pressure <= self._limits.low and self._fits_wider(load)
        if self._has_lasted("scarce", is_scarce, now_s):
            self._move(1)
        elif self._has_lasted("calm", is_calm, now_s):
            self._move(-1)
        return self.active

    def choose(self, num_prompt_tokens: int) -> Variant:
        """Return the variant for one request, and count it."""
        limit = self._limits.long_prompt_tokens
        is_long = limit is not None and num_prompt_tokens >= limit
        variant = self._variants[-1] if is_long else self.active
        self._requests.labels(variant.name).inc()
        return variant

    def start(self, free_memory_bytes: int) -> Variant:
        """Choose the widest variant that fits the memory; ConfigError where none does."""
        for index, variant in enumerate(self._variants):
            if variant.memory_bytes <= free_memory_bytes:
                self._index = index
                self._show()
                return variant
        raise ConfigError(
            f"precision: {self._variants[-1].name}, the narrowest variant, needs"
            f" {self._variants[-1].memory_bytes} bytes, and {free_memory_bytes} are free",
            param="precision",
        )

    def _fits_wider(self, load: Load) -> bool:
        return self._variants[self._index - 1].memory_bytes <= load.free_memory_bytes

    def _has_lasted(self, what: str, holds: bool, now_s: float) -> bool:
        if not holds:
            self._since.pop(what, None)
            return False
        return now_s - self._since.setdefault(what, now_s) >= self._limits.patience_s

    def _move(self, step: int) -> None:
        self._index += step
        self._since.clear()
        self._switches.labels(self.active.name).inc()
        self._show()

    def _show(self) -> None:
        for index, variant in enumerate(self._variants):
            self._active.labels(variant.name).set(float(index == self._index))
