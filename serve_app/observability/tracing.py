"""Spans with OpenTelemetry's conventions for generative AI; nothing of it is imported while off.

One trace per request::

    chat MODEL (ingress, server)
      ├─ preprocess (ingress: what follows, with the way there and back)
      │    └─ tokenize (preprocessor: chat template, tokenisation, the wait for a micro-batch)
      └─ generate (model replica)
           ├─ engine.queue    from submission to the first step that has tokens of it
           ├─ engine.prefill  the steps up to its first token
           └─ engine.decode   the steps after that

Where an engine cannot tell when it began, the first two are one, `engine.queue_and_prefill`.

Conventions: opentelemetry.io/docs/specs/semconv/gen-ai (attributes `gen_ai.*`); names and counts
only, never text. Context travels as W3C `traceparent` (www.w3.org/TR/trace-context).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from serve_app import __version__
from serve_app.config.sections_tracing import TracingSection
from serve_app.core.errors import ConfigError
from serve_app.observability.logs import request_id_var, trace_id_var

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

TRACEPARENT = "traceparent"
REQUEST_ID = "x-request-id"
PROVIDER_NAME = "xeray"
_CARRIER_KEYS = (TRACEPARENT, "tracestate")
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NANOSECONDS = 1_000_000_000
_EXPORT_TIMEOUT_S = 5.0
"""A collector that does not answer costs this much at each attempt, and at the end."""

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

    def phase(
        self,
        name: str,
        begin_s: float,
        end_s: float,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> None:
        """Add a span below this one that is over already; Unix seconds."""
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

    def phase(
        self,
        name: str,
        begin_s: float,
        end_s: float,
        attributes: Mapping[str, Attribute] | None = None,
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

    __slots__ = ("_span", "_tracer")

    def __init__(self, span: Any, tracer: Any) -> None:
        self._span = span
        self._tracer = tracer

    @property
    def trace_id(self) -> str:
        return f"{self._span.get_span_context().trace_id:032x}"

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        self._span.set_attributes(dict(attributes))

    def phase(
        self,
        name: str,
        begin_s: float,
        end_s: float,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> None:
        from opentelemetry import trace

        span = self._tracer.start_span(
            name,
            context=trace.set_span_in_context(self._span),
            attributes=dict(attributes or {}),
            start_time=int(begin_s * _NANOSECONDS),
        )
        span.end(int(max(begin_s, end_s) * _NANOSECONDS))

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


def follow(carrier: Mapping[str, str]) -> None:
    """Let the rest of this task log under the request and the trace that `carrier` names."""
    request_id_var.set(carrier.get(REQUEST_ID, ""))
    trace_id_var.set(trace_id_of(carrier.get(TRACEPARENT, "")))


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
        return _OtelSpan(span, self._tracer)

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
        """Send what is still held; blocks for `_EXPORT_TIMEOUT_S` at most. Once is enough."""
        provider, self._provider = self._provider, None
        if provider is not None:
            provider.shutdown()


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
    section: TracingSection,
    role: str,
    exporter: SpanExporter | None = None,
    *,
    instance: str = "",
) -> Tracing:
    """Return the tracing of a process in `role`; off without endpoint.

    Roles are ingress, preprocessor and model_replica; `instance` is the replica's id. `exporter`
    replaces OTLP over HTTP. Raises ConfigError where the packages are missing.
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
            "service.instance.id": instance or str(os.getpid()),
            "host.name": socket.gethostname(),
            "process.pid": os.getpid(),
            "xeray.role": role,
        }
    )
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(section.sample_ratio), resource=resource
    )
    if exporter is None:
        sender = OTLPSpanExporter(endpoint=section.endpoint, timeout=_EXPORT_TIMEOUT_S)
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
