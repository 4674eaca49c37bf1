"""What a model replica tells besides its engine's statistics: its state, energy, cost, spans."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge

from serve_app.config.sections_cost import CostSection
from serve_app.core.requests import GenerateRequest, ReplicaHealth
from serve_app.observability.energy import CostMetrics, EnergyReader
from serve_app.observability.generation_span import GenerationSpan
from serve_app.observability.metrics import PREFIX, REPLICA_STATES
from serve_app.observability.tracing import Tracing


class ReplicaTelemetry:
    """Samples in `registry` with the label `model_name`, and spans where `tracing` is on."""

    def __init__(
        self,
        model_name: str,
        cost: CostSection,
        registry: CollectorRegistry,
        reader: EnergyReader | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._model_name = model_name
        self._tracing = tracing or Tracing()
        self._cost = CostMetrics(model_name, cost, reader or EnergyReader())
        registry.register(self._cost)
        self._state = Gauge(
            f"{PREFIX}replica_state",
            "1 for the state that the replica is in, 0 for the others.",
            ("model_name", "state"),
            registry=registry,
        )
        self._progress_age = Gauge(
            f"{PREFIX}replica_progress_age_seconds",
            "Time since the engine last made progress, seconds.",
            ("model_name",),
            registry=registry,
        ).labels(model_name)

    def update(self, health: ReplicaHealth, busy_s: float) -> None:
        """Take over the replica's health and its engine's busy seconds; reads energy counters."""
        self._cost.update(busy_s)
        for state in {*REPLICA_STATES, health.state}:
            self._state.labels(self._model_name, state).set(float(state == health.state))
        self._progress_age.set(health.last_progress_age_s)

    def trace(self, request: GenerateRequest) -> GenerationSpan:
        """Return the span of a sequence, below the one that its request names."""
        return GenerationSpan(self._tracing, request.trace_context, self._model_name)
