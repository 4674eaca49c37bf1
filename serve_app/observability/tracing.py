"""Spans with OpenTelemetry's conventions for generative AI; nothing of it is imported while off.

One trace per request::

    chat MODEL (ingress, server)
      ├─ preprocess (ingress: chat template and tokenisation, with the way there and back)
      └─ generate (model replica), with the events engine.queued, engine.prefill, engine.decode

Conventions: opentelemetry.io/docs/specs/semconv/gen-ai (attributes `gen_ai.*`); names and counts
only, never text. Context travels as W3C `traceparent` (www.w3.org/TR/trace-context).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from serve_app import __version__
from serve_app.config.sections_tracing import TracingSection
from serve_app.core.errors import ConfigError
from serve_app.observability.logs import trace_id_var

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

TRACEPARENT = "traceparent"
PROVIDER_NAME = "xeray"
_CARRIER_KEYS = (TRACEPARENT, "tracestate")
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NANOSECONDS = 1_000_000_000

Attribute = str | int | float | bool | tuple[str, ...]


class Span(Protocol):
    """What code that is traced may do with its span, on or off."""

    @property
    def trace_id(self) -> str:
        """The trace's id, 32 hexadecimal digits; empty where there is none."""
        ...

    def rename(self, name: str) -> None:
        """Give the span the name that became known later."""
        ...

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        """Add attributes."""
        ...

    def event(
        self, name: str, at_s: float, attributes: Mapping[str, Attribute] | None = None
    ) -> None:
        """Add an event that happened at `at_s`, Unix seconds."""
        ...

    def fail(self, kind: str) -> None:
        """Mark the span as failed; `kind` is the error's code."""
        ...

    def context(self) -> dict[str, str]:
        """Return the headers that let another process go on with the trace."""
        ...

    def end(self) -> None:
        """End the span; once."""
        ...


class NullSpan:
    """The span of a request that is not traced; it remembers a caller's trace id for the logs."""

    __slots__ = ("trace_id",)

    def __init__(self, trace_id: str = "") -> None:
        self.trace_id = trace_id

    def rename(self, name: str) -> None:
        """Do nothing."""

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        """Do nothing."""

    def event(
        self, name: str, at_s: float, attributes: Mapping[str, Attribute] | None = None
    ) -> None:
        """Do nothing."""

    def fail(self, kind: str) -> None:
        """Do nothing."""

    def context(self) -> dict[str, str]:
        """Return nothing."""
        return {}

    def end(self) -> None:
        """Do nothing."""


class _OtelSpan:
    """A span of the SDK."""

    __slots__ = ("_span",)

    def __init__(self, span: Any) -> None:
        self._span = span

    @property
    def trace_id(self) -> str:
        return f"{self._span.get_span_context().trace_id:032x}"

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        self._span.set_attributes(dict(attributes))

    def event(
        self, name: str, at_s: float, attributes: Mapping[str, Attribute] | None = None
    ) -> None:
        self._span.add_event(name, dict(attributes or {}), timestamp=int(at_s * _NANOSECONDS))

    def fail(self, kind: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("error.type", kind)
        self._span.set_status(Status(StatusCode.ERROR))

    def context(self) -> dict[str, str]:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, trace.set_span_in_context(self._span))
        return carrier

    def end(self) -> None:
        self._span.end()


_span_var: ContextVar[Span] = ContextVar("xeray_span", default=NullSpan())  # noqa: B039


def current_span() -> Span:
    """Return the span of the request that the current task works for."""
    return _span_var.get()


@contextmanager
def as_current(span: Span) -> Iterator[None]:
    """Make `span` the current one within the block; also of the tasks that begin there."""
    token = _span_var.set(span)
    trace_token = trace_id_var.set(span.trace_id)
    try:
        yield
    finally:
        trace_id_var.reset(trace_token)
        _span_var.reset(token)


class Tracing:
    """Makes the spans of one process. Without `provider` tracing is off and costs nothing."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = None if provider is None else provider.get_tracer("xeray", __version__)

    @property
    def is_on(self) -> bool:
        """Whether spans are made."""
        return self._tracer is not None

    def start(
        self,
        name: str,
        carrier: Mapping[str, str],
        *,
        is_server: bool = False,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> Span:
        """Start a span below what `carrier` (headers, keys in small letters) names, or a trace."""
        if self._tracer is None:
            return NullSpan(trace_id_of(carrier.get(TRACEPARENT, "")))
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # From an empty context: the current one may be another library's.
        parent = TraceContextTextMapPropagator().extract(dict(carrier), Context())
        span = self._tracer.start_span(
            name,
            context=parent,
            kind=SpanKind.SERVER if is_server else SpanKind.INTERNAL,
            attributes=dict(attributes or {}),
        )
        return _OtelSpan(span)

    @contextmanager
    def span(self, name: str, carrier: Mapping[str, str]) -> Iterator[Span]:
        """Run the block within a span; what the block raises marks it as failed."""
        span = self.start(name, carrier)
        try:
            yield span
        except Exception as error:
            span.fail(str(getattr(error, "code", "") or type(error).__name__))
            raise
        finally:
            span.end()

    def close(self) -> None:
        """Send what is still held; blocks for a few seconds at most."""
        if self._provider is not None:
            self._provider.shutdown()


def check_tracing(section: TracingSection) -> None:
    """Raise ConfigError where tracing is configured and its packages are missing."""
    if section.endpoint is not None:
        try:
            import opentelemetry.exporter.otlp.proto.http.trace_exporter
            import opentelemetry.sdk.trace  # noqa: F401
        except ImportError:
            raise _missing_packages() from None


def _missing_packages() -> ConfigError:
    return ConfigError(
        "tracing.endpoint needs packages that are not installed: pip install 'xeray[tracing]'",
        param="tracing.endpoint",
    )


def make_tracing(
    section: TracingSection, role: str, exporter: SpanExporter | None = None
) -> Tracing:
    """Return the tracing of a process in `role` (ingress, model_replica); off without endpoint.

    `exporter` replaces OTLP over HTTP. Raises ConfigError where the packages are missing.
    """
    if section.endpoint is None and exporter is None:
        return Tracing()
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise _missing_packages() from None
    resource = Resource.create(
        {
            "service.name": section.service_name,
            "service.version": __version__,
            "service.namespace": "xeray",
            "xeray.role": role,
        }
    )
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(section.sample_ratio), resource=resource
    )
    if exporter is None:
        sender = OTLPSpanExporter(endpoint=section.endpoint)
        provider.add_span_processor(BatchSpanProcessor(sender))
    else:
        provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider)


def trace_headers(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return the headers of an ASGI scope that carry a trace."""
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in headers
        if name.decode("latin-1") in _CARRIER_KEYS
    }


def trace_id_of(traceparent: str) -> str:
    """Return the trace's id out of a W3C traceparent; empty where it is none."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None or match[1] == "ff" or not int(match[2], 16) or not int(match[3], 16):
        return ""
    if match[1] == "00" and match[5]:
        return ""
    return match[2]


class GenerationSpan:
    """The span of one sequence in a model replica, with the engine's times as events."""

    def __init__(self, tracing: Tracing, carrier: Mapping[str, str], model: str) -> None:
        self._began_s = time.time()
        self._first_token_s: float | None = None
        self._span = tracing.start(
            "generate",
            carrier,
            attributes={"gen_ai.operation.name": "generate_content", "gen_ai.request.model": model},
        )

    def first_token(self, queue_time_s: float | None, engine_ttft_s: float) -> None:
        """Note the engine's first token: seconds in its queue, and from submission to it."""
        self._first_token_s = self._began_s + engine_ttft_s
        scheduled_s = self._began_s + (queue_time_s or 0.0)
        if queue_time_s is not None:
            self._span.event("engine.queued", self._began_s, {"xeray.duration_s": queue_time_s})
        self._span.event(
            "engine.prefill",
            scheduled_s,
            {"xeray.duration_s": max(0.0, self._first_token_s - scheduled_s)},
        )
        self._span.set({"gen_ai.response.time_to_first_chunk": engine_ttft_s})

    def end(self, num_prompt: int, num_generated: int, failure: str = "") -> None:
        """End the span, with the tokens in and out; `failure` is an error's code."""
        if self._first_token_s is not None:
            decode_s = max(0.0, time.time() - self._first_token_s)
            self._span.event(
                "engine.decode",
                self._first_token_s,
                {"xeray.duration_s": decode_s, "xeray.num_tokens": num_generated},
            )
        self._span.set(
            {"gen_ai.usage.input_tokens": num_prompt, "gen_ai.usage.output_tokens": num_generated}
        )
        if failure:
            self._span.fail(failure)
        self._span.end()
