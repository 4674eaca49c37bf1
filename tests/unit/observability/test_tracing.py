from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serve_app.config.sections_tracing import TracingSection
from serve_app.core.errors import ConfigError
from serve_app.observability.generation_span import GenerationSpan
from serve_app.observability.tracing import (
    NullSpan,
    Tracing,
    as_current,
    check_tracing,
    current_span,
    make_tracing,
    trace_headers,
    trace_id_of,
)

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
ENDPOINT = "http://127.0.0.1:4318/v1/traces"


@pytest.mark.parametrize(
    ("traceparent", "trace_id"),
    [
        (f"00-{TRACE_ID}-00f067aa0ba902b7-01", TRACE_ID),
        (f"01-{TRACE_ID}-00f067aa0ba902b7-01-more", TRACE_ID),  # a later version may add fields
        (f"00-{TRACE_ID}-00f067aa0ba902b7-01-more", ""),
        (f"ff-{TRACE_ID}-00f067aa0ba902b7-01", ""),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", ""),
        (f"00-{TRACE_ID}-{'0' * 16}-01", ""),
        (f"00-{TRACE_ID.upper()}-00f067aa0ba902b7-01", ""),
        ("", ""),
    ],
)
def test_trace_id_of_a_traceparent(traceparent: str, trace_id: str):
    assert trace_id_of(traceparent) == trace_id


@given(st.text(max_size=70))
def test_any_header_is_taken_or_left(text: str):
    assert trace_id_of(text) in ("", text[3:35])


def test_only_the_traces_headers_travel():
    headers = [(b"traceparent", b"a"), (b"authorization", b"Bearer x"), (b"tracestate", b"b")]
    assert trace_headers(headers) == {"traceparent": "a", "tracestate": "b"}


def test_off_it_makes_no_span_and_keeps_the_callers_trace_id():
    tracing = make_tracing(TracingSection(), "ingress")
    span = tracing.start("x", {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"})
    assert not tracing.is_on
    assert isinstance(span, NullSpan)
    assert span.trace_id == TRACE_ID
    assert span.context() == {}


def test_current_span_ends_with_its_block():
    span = NullSpan(TRACE_ID)
    with as_current(span):
        assert current_span() is span
    assert current_span() is not span


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    section = TracingSection(endpoint=ENDPOINT)
    for check in (check_tracing, lambda section: make_tracing(section, "ingress")):
        with pytest.raises(ConfigError, match=r"pip install 'xeray\[tracing\]'"):
            check(section)
    check_tracing(TracingSection())


def test_with_an_endpoint_it_is_on():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs extra tracing")
    check_tracing(TracingSection(endpoint=ENDPOINT))
    tracing = make_tracing(TracingSection(endpoint=ENDPOINT, sample_ratio=0), "ingress")
    try:
        assert tracing.is_on
        span = tracing.start("x", {})
        assert len(span.trace_id) == 32
        span.end()
    finally:
        tracing.close()
    Tracing().close()


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "grpc://host:1", "http://"])
def test_an_endpoint_is_a_url(endpoint: str):
    with pytest.raises(ValidationError, match="expected an http:// or https:// URL"):
        TracingSection(endpoint=endpoint)


@pytest.mark.parametrize(
    ("queue_time_s", "phases"),
    [
        (0.25, ["engine.queue", "engine.prefill"]),
        (None, ["engine.queue_and_prefill"]),  # an unknown wait is no wait of zero
    ],
)
def test_the_phases_before_the_first_token(queue_time_s: float | None, phases: list[str]):
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    tracing = make_tracing(TracingSection(), "model_replica", exporter)
    span = GenerationSpan(tracing, {}, "m")
    span.first_token(queue_time_s, 0.75)
    span.end(4, 1)
    found = {each.name: each for each in exporter.get_finished_spans()}
    assert [name for name in found if name.startswith("engine")] == [*phases, "engine.decode"]
    lengths_s = [(found[name].end_time - found[name].start_time) / 1e9 for name in phases]
    assert sum(lengths_s) == pytest.approx(0.75, abs=1e-3)
    tracing.close()


def test_the_end_of_a_sequence_is_a_line_of_its_request(caplog: pytest.LogCaptureFixture):
    caplog.set_level("DEBUG", logger="serve_app.observability.generation_span")
    for failure in ("", "internal_error"):
        span = GenerationSpan(Tracing(), {"x-request-id": "r-1"}, "m")
        span.end(12, 3, 4, failure)
    told = "12 prompt tokens, 4 of them cached, 3 generated"
    assert caplog.messages == [f"ended: {told}", f"failed (internal_error): {told}"]
    assert {record.request_id for record in caplog.records} == {"r-1"}
