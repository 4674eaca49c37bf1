"""One trace through the in-process graph: application, preparation, engine process."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from io import StringIO
from typing import Any

import httpx
import pytest
import pytest_asyncio

from serve_app.api.app import create_app
from serve_app.config.model_source import resolve_model
from serve_app.config.schema import AppConfig, LoggingSection
from serve_app.core.errors import EngineError
from serve_app.core.events import EngineCapabilities
from serve_app.core.requests import (
    GenerateChunk,
    GenerateRequest,
    ModelCard,
    PreparedPrompt,
    PrepareRequest,
    ServiceHealth,
)
from serve_app.deployments.model_service import ModelService
from serve_app.deployments.prompt_preparation import PromptPreparer
from serve_app.engine.client import EngineClient
from serve_app.observability.activity import ActivityReport
from serve_app.observability.logs import setup_logging
from serve_app.observability.tracing import make_tracing
from serve_app.text.tokenizer import load_tokenizer

pytest.importorskip("opentelemetry.sdk.trace", reason="needs the extra tracing")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

pytestmark = pytest.mark.asyncio(loop_scope="module")
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
SECRET = "Secret words"
PHASES = ("engine.queue", "engine.prefill", "engine.decode")
BODY = {
    "model": "m",
    "messages": [{"role": "user", "content": SECRET}],
    "max_tokens": 6,
    "temperature": 0.5,
    "ignore_eos": True,
}


class LocalBackend:
    """The graph without Ray: the same preparation and the same model service, in one process."""

    def __init__(self, preparer: PromptPreparer, service: ModelService) -> None:
        self.preparer = preparer
        self.service = service

    async def models(self) -> list[ModelCard]:
        return [self.preparer.card]

    async def capabilities(self, model_id: str) -> EngineCapabilities:
        return self.service.info.capabilities

    async def prepare(self, model_id: str, request: PrepareRequest) -> PreparedPrompt:
        return self.preparer.prepare_batch([request])[0]

    async def detokenize(self, model_id: str, token_ids: tuple[int, ...]) -> str:
        return self.preparer.detokenize(token_ids)

    async def token_strings(self, model_id: str, token_ids: tuple[int, ...]) -> list[str]:
        return list(self.preparer.token_strings(token_ids))

    def generate(
        self, model_id: str, request: GenerateRequest
    ) -> AsyncGenerator[GenerateChunk, None]:
        return self.service.generate(request)

    async def health(self) -> ServiceHealth:
        return ServiceHealth(True, "ready", (self.service.health(),))

    async def metrics_text(self) -> str:
        return await self.service.metrics_text()

    async def activity(self) -> list[ActivityReport]:
        return []

    async def drain(self) -> None:
        self.service.drain()


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> InMemorySpanExporter:
    exporter.clear()
    return exporter


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(exporter: InMemorySpanExporter) -> AsyncIterator[httpx.AsyncClient]:
    spans = exporter
    config = AppConfig.model_validate(
        {"model": {"aliases": ["m"]}, "engine": {"fixed_rate_tokens_per_s": 500.0}}
    )
    engine = EngineClient(config.model, config.engine)
    await engine.start()
    tokenizer = load_tokenizer(resolve_model(config.model))
    tracing = make_tracing(config.tracing, "model_replica", spans)
    service = ModelService(config, engine, tokenizer, "r1", tracing=tracing)
    backend: Any = LocalBackend(PromptPreparer(config.model), service)
    app = create_app(backend, config, tracing=make_tracing(config.tracing, "ingress", spans))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        client.headers["x-request-id"] = "request-7"
        yield client
    service.close()
    await engine.close()


def by_name(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name.split()[0]: span for span in spans.get_finished_spans()}


async def test_one_trace_from_the_caller_to_the_engines_steps(
    client: httpx.AsyncClient, spans: InMemorySpanExporter
):
    answer = await client.post(
        "/v1/chat/completions", json=BODY, headers={"traceparent": TRACEPARENT}
    )
    usage = answer.json()["usage"]
    found = by_name(spans)
    assert set(found) == {"chat", "preprocess", "generate", *PHASES}
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {TRACE_ID}
    root = found["chat"]
    assert root.kind is SpanKind.SERVER
    assert f"{root.parent.span_id:016x}" == PARENT_ID
    for name in ("preprocess", "generate"):
        assert found[name].parent.span_id == root.context.span_id
    assert root.attributes["gen_ai.operation.name"] == "chat"
    assert root.attributes["gen_ai.request.temperature"] == 0.5
    assert root.attributes["gen_ai.request.max_tokens"] == 6
    assert root.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert root.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert root.attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 6
    assert root.attributes["xeray.request_id"] == "request-7"
    assert root.attributes["http.response.status_code"] == 200
    generate = found["generate"]
    assert generate.attributes["gen_ai.usage.output_tokens"] == 6
    assert generate.attributes["xeray.request_id"] == "request-7"
    assert generate.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    phases = [found[name] for name in PHASES]
    for phase in phases:
        assert phase.parent.span_id == generate.context.span_id
        assert generate.start_time <= phase.start_time <= phase.end_time <= generate.end_time
    # One begins where the other ends, up to the rounding to nanoseconds.
    for before, after in itertools.pairwise(phases):
        assert abs(after.start_time - before.end_time) < 1000
    assert found["engine.decode"].attributes["gen_ai.usage.output_tokens"] == 6
    ttfts_s = [span.attributes["gen_ai.response.time_to_first_chunk"] for span in (generate, root)]
    assert 0 < ttfts_s[0] <= ttfts_s[1], "the client's includes the engine's"
    roles = {span.resource.attributes["xeray.role"] for span in found.values()}
    assert roles == {"ingress", "model_replica"}


async def test_spans_never_hold_text(client: httpx.AsyncClient, spans: InMemorySpanExporter):
    answer = await client.post("/v1/chat/completions", json={**BODY, "stream": True})
    assert "[DONE]" in answer.text
    told = " ".join(span.to_json() for span in spans.get_finished_spans())
    assert "gen_ai.request.stream" in told
    assert SECRET not in told


async def test_a_failure_marks_its_span(
    client: httpx.AsyncClient, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_args: object) -> None:
        raise EngineError(f"lost with {SECRET}")

    monkeypatch.setattr(PromptPreparer, "prepare_batch", broken)
    assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 500
    found = by_name(spans)
    for span in found.values():
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes["error.type"] == "internal_error"
    assert set(found) == {"chat", "preprocess"}
    assert SECRET not in found["chat"].to_json()


async def test_probes_make_no_spans(client: httpx.AsyncClient, spans: InMemorySpanExporter):
    await client.get("/health")
    assert spans.get_finished_spans() == ()


async def test_logs_tell_request_and_trace_and_no_prompt(client: httpx.AsyncClient):
    stream = StringIO()
    logger = setup_logging(LoggingSection(encoding="JSON", level="DEBUG"), stream)
    try:
        headers = {"traceparent": TRACEPARENT}
        await client.post("/v1/chat/completions", json=BODY, headers=headers)
    finally:
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    access = next(line for line in lines if line["logger"] == "serve_app.access")
    assert (access["request_id"], access["trace_id"]) == ("request-7", TRACE_ID)
    assert SECRET not in stream.getvalue()
