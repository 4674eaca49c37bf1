"""Dynamic precision: which of a model's widths takes the next request.

Variants are pools that hold one model in different widths, widest first. A pool counts as loadable
while it has a replica that is ready: one whose weights do not fit its memory never has. The widest
that can be loaded serves as long as there is room; pressure moves the choice one step narrower,
calm one step back::

    pressure = max(KV cache in use, sequences waiting or running / max_num_seqs)

    narrower   pressure ≥ high for the whole of `patience_s`
    wider      pressure ≤ low, of both, for the whole of `patience_s`
    long prompt   a prompt of `long_prompt_tokens` or more goes to the narrowest for itself

Between `low` and `high` nothing changes, so that load near one limit does not make it swing. A
request keeps its variant to its end: a switch concerns those that come after.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge

from serve_app.config.sections_precision import PrecisionSection
from serve_app.core.clock import Clock, MonotonicClock
from serve_app.core.errors import ConfigError
from serve_app.core.requests import ReplicaHealth


@dataclass(frozen=True, slots=True)
class Load:
    """What a variant's replicas report together.

    `kv_cache_usage` is a share of 1, of the fullest replica; `num_sequences` counts waiting and
    running ones of all.
    """

    kv_cache_usage: float
    num_sequences: int
    max_num_seqs: int

    @property
    def pressure(self) -> float:
        """The scarcer of the two; above 1 where sequences wait."""
        return max(self.kv_cache_usage, self.num_sequences / max(1, self.max_num_seqs))

    @classmethod
    def of(cls, replicas: Iterable[ReplicaHealth]) -> Load:
        """Add up what replicas report; those that report no load count for nothing."""
        loads = [replica.load for replica in replicas if replica.load is not None]
        return cls(
            max((x.num_used_blocks / x.num_blocks for x in loads if x.num_blocks), default=0.0),
            sum(x.num_streams for x in loads),
            sum(x.max_num_seqs for x in loads),
        )


class PrecisionPolicy:
    """Chooses a variant per request. `variants` are names, widest first, of at least one.

    Metrics: gauge `xeray_precision_active` by variant (1 for the one in use) and counters
    `xeray_precision_switches` and `xeray_precision_requests` by variant. Not for several threads.
    """

    def __init__(
        self,
        variants: Sequence[str],
        limits: PrecisionSection | None = None,
        *,
        clock: Clock | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        if not variants or len(set(variants)) < len(variants):
            raise ConfigError(
                "precision: name at least one variant, each by a name of its own", param="precision"
            )
        self._variants = tuple(variants)
        self._loadable = tuple(variants)
        self._limits = limits or PrecisionSection()
        self._clock = clock or MonotonicClock()
        self._active = self._variants[0]
        self._since: dict[str, float] = {}
        registry = registry or CollectorRegistry()
        self._gauge = Gauge(
            "xeray_precision_active", "1 for the variant in use.", ["variant"], registry=registry
        )
        self._switches = Counter(
            "xeray_precision_switches", "Changes to a variant.", ["variant"], registry=registry
        )
        self._requests = Counter(
            "xeray_precision_requests", "Requests by variant.", ["variant"], registry=registry
        )
        self._show()

    @property
    def active(self) -> str:
        """The variant that ordinary requests go to now."""
        return self._active

    def update(self, ranked: Iterable[tuple[int, ReplicaHealth]]) -> str:
        """Take in the health of all replicas, each with the rank of its pool; see `observe`."""
        replicas: dict[str, list[ReplicaHealth]] = {}
        for rank, health in ranked:
            if health.state == "ready":
                replicas.setdefault(self._variants[rank], []).append(health)
        return self.observe({name: Load.of(group) for name, group in replicas.items()})

    def observe(self, loads: Mapping[str, Load]) -> str:
        """Take in the load of each variant that can be used; return the active one then.

        Where the active one cannot be used any more, the widest that can takes its place at once.
        """
        self._loadable = tuple(name for name in self._variants if name in loads)
        if not self._loadable:
            return self._active  # nothing to choose from; requests wait, or are refused
        if self._active not in self._loadable:
            self._move_to(self._loadable[0])
            return self._active
        now_s = self._clock.now()
        place = self._loadable.index(self._active)
        can_narrow = place + 1 < len(self._loadable)
        is_scarce = can_narrow and loads[self._active].pressure >= self._limits.high
        # The wider one may still be full of what it got before the choice moved away.
        is_calm = place > 0 and all(
            loads[name].pressure <= self._limits.low
            for name in self._loadable[place - 1 : place + 1]
        )
        if self._has_lasted("scarce", is_scarce, now_s):
            self._move_to(self._loadable[place + 1])
        elif self._has_lasted("calm", is_calm, now_s):
            self._move_to(self._loadable[place - 1])
        return self._active

    def choose(self, num_prompt_tokens: int) -> str:
        """Return the variant for one request, and count it."""
        limit = self._limits.long_prompt_tokens
        is_long = limit is not None and num_prompt_tokens >= limit
        variant = self._loadable[-1] if is_long and self._loadable else self._active
        self._requests.labels(variant).inc()
        return variant

    def choose_rank(self, num_prompt_tokens: int) -> int:
        """Return the rank of the pool for one request, and count it."""
        return self._variants.index(self.choose(num_prompt_tokens))

    def _has_lasted(self, what: str, holds: bool, now_s: float) -> bool:
        if not holds:
            self._since.pop(what, None)
            return False
        return now_s - self._since.setdefault(what, now_s) >= self._limits.patience_s

    def _move_to(self, variant: str) -> None:
        self._active = variant
        self._since.clear()
        self._switches.labels(variant).inc()
        self._show()

    def _show(self) -> None:
        for variant in self._variants:
            self._gauge.labels(variant).set(float(variant == self._active))
