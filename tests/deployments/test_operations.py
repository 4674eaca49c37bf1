"""One application, watched: it changes its precision under load, and traces over its processes."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra tracing")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACE_ID, CALLER_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "Secret words"


@dataclass(frozen=True, slots=True)
class Received:
    """A span as it arrived: of which process, below which span, with which plain attributes."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    pid: int
    role: str
    attributes: dict[str, Any]
    begin_ns: int
    end_ns: int


class Collector(http.server.ThreadingHTTPServer):
    """Takes OTLP over HTTP at a free port of loopback."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self.bodies: list[bytes] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

    def take(self, body: bytes) -> None:
        self.bodies.append(body)
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            process = _values(group.resource.attributes)
            for scope in group.scope_spans:
                self.spans += [_received(span, process) for span in scope.spans]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        is_packed = self.headers.get("content-encoding") == "gzip"
        self.server.take(gzip.decompress(body) if is_packed else body)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


def _received(span: Any, process: dict[str, Any]) -> Received:
    return Received(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        process["process.pid"],
        process["xeray.role"],
        _values(span.attributes),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
    )


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with contextlib.ExitStack() as stack:
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            yield server


@pytest.fixture(scope="module")
def app(shared_serve: Any, collector: Collector) -> Iterator[Any]:
    """An application of two widths of the model, whose spans go to the collector."""
    started = shared_serve.deploy(
        {
            "tracing": {"endpoint": collector.endpoint},
            "engine": {"max_num_seqs": 2},
            "pools": [{"name": "wide"}, {"name": "narrow"}],
            "precision": {"mode": "auto", "patience_s": 0.3, "long_prompt_tokens": 200},
        }
    )
    yield started
    started.delete()


def await_metric(app: Any, line: str) -> None:
    """Wait until /metrics has a line that matches."""
    deadline_s = time.monotonic() + 20
    while not re.search(line, httpx.get(f"{app.url}/metrics", timeout=10).text, re.MULTILINE):
        assert time.monotonic() < deadline_s, f"no {line}"
        time.sleep(0.1)


def test_pressure_moves_requests_to_the_narrow_pool_and_calm_brings_them_back(app: Any) -> None:
    app.wait_states("ModelReplica-narrow", lambda states: len(states) == 1)
    await_metric(app, r'^xeray_precision_active{.*variant="wide".*} 1')
    running = app.start_streams(2, 600)
    await_metric(app, r'^xeray_precision_active{.*variant="narrow".*} 1')
    assert app.chat().status_code == 200
    (narrow,) = app.states("ModelReplica-narrow", "stats")
    assert narrow.num_prompt_tokens_total > 0
    assert running.result(timeout=60) == ["done"] * 2, "they stayed where they were"
    await_metric(app, r'^xeray_precision_active{.*variant="wide".*} 1')
    long_prompt = [{"role": "user", "content": "One word more. " * 100}]
    assert app.chat(messages=long_prompt).status_code == 200
    (after,) = app.states("ModelReplica-narrow", "stats")
    assert after.num_prompt_tokens_total > narrow.num_prompt_tokens_total + 200


def test_one_trace_from_ingress_over_preprocessor_to_the_engines_steps(
    app: Any, collector: Collector
) -> None:
    answer = httpx.post(
        f"{app.url}/v1/chat/completions",
        headers={"traceparent": f"00-{TRACE_ID}-{CALLER_ID}-01", "x-request-id": "request-7"},
        json={"model": "m", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 6},
        timeout=30,
    )
    usage = answer.json()["usage"]
    app.delete()  # what the processes still held is sent before they end
    ours = [span for span in collector.spans if span.trace_id == TRACE_ID]
    spans = {span.name.split()[0]: span for span in ours}
    phases = ("engine.queue", "engine.prefill", "engine.decode")
    below = {"chat": CALLER_ID, "preprocess": "chat", "tokenize": "preprocess", "generate": "chat"}
    below |= dict.fromkeys(phases, "generate")
    assert set(spans) == set(below)
    for name, parent in below.items():
        span = spans[name]
        assert span.parent_id == (spans[parent].span_id if parent in spans else parent), name
        assert span.begin_ns <= span.end_ns
    roles = {name: span.role for name, span in spans.items()}
    assert (roles["chat"], roles["tokenize"], roles["generate"]) == (
        "ingress",
        "preprocessor",
        "model_replica",
    )
    assert len({span.pid for span in spans.values()}) == 3
    for name in ("chat", "generate"):
        told = spans[name].attributes
        assert told["xeray.request_id"] == "request-7"
        assert told["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        assert told["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 6
        assert told["gen_ai.response.time_to_first_chunk"] > 0
    assert not any(SECRET.encode() in body for body in collector.bodies)
