"""Requests that leave for an upstream, and those that must not."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import yaml

from serve_app.api.app import create_app
from serve_app.api.fallback.policy import (
    CircuitBreaker,
    CircuitState,
    HourlyBudget,
    SlidingLatency,
)
from serve_app.config.schema import AppConfig
from serve_app.core.errors import OverloadedError

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
ANSWER = {"choices": [{"message": {"content": "from afar"}}], "usage": {"total_tokens": 40}}
RESPONSES = {"model": "tiny", "input": "hi", "instructions": "Be brief.", "max_output_tokens": 9}
CALL = {"index": 0, "id": "call_1", "function": {"name": "f", "arguments": '{"a"'}}
DELTAS = [
    {"delta": {"role": "assistant", "content": ""}},
    {"delta": {"reasoning_content": "hm"}},
    {"delta": {"content": "far"}},
    {"delta": {"tool_calls": [CALL]}},
    {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}},
    {"delta": {}, "finish_reason": "tool_calls"},
]
USAGE = {"prompt_tokens": 30, "completion_tokens": 10, "total_tokens": 40}
EVENTS = b'data: {"choices": [{"delta": {"content": "far"}}]}\n\ndata: [DONE]\n\n'


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class FakeUpstream:
    """A server that answers each POST with `status` and JSON, or events; `cuts` breaks off."""

    status: int = 200
    cuts: bool = False
    whole: dict[str, Any] = field(default_factory=lambda: ANSWER)
    events: bytes = EVENTS
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        self.heads.append(head)
        self.bodies.append(body)
        kind, data = b"application/json", json.dumps(self.whole).encode()
        if body.get("stream"):
            kind, data = b"text/event-stream", self.events
        told = len(data) + 100 * self.cuts
        writer.write(
            b"HTTP/1.1 %d X\r\nContent-Type: %s\r\nContent-Length: %d\r\n"
            b"Connection: close\r\n\r\n" % (self.status, kind, told) + data
        )
        await writer.drain()
        writer.close()


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    fake = FakeUpstream()
    server = await asyncio.start_server(fake.answer, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    async with server:
        yield fake


def client_of(backend, url: str, **more: Any) -> httpx.AsyncClient:
    fallback = {"url": url, "min_samples": 1, "failure_threshold": 1, **more.pop("fallback", {})}
    config = AppConfig.model_validate({"fallback": fallback, **more})
    transport = httpx.ASGITransport(create_app(backend, config), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")


async def ask(client: httpx.AsyncClient, headers: Any = None, **more: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={**CHAT, **more}, headers=headers)


async def test_a_healthy_service_answers_itself_and_says_so(backend, upstream) -> None:
    answer = await ask(client_of(backend, upstream.url))
    assert answer.headers["X-XeRay-Served-By"] == "local"
    assert upstream.bodies == []


async def test_without_a_replica_the_upstream_answers(backend, upstream, monkeypatch) -> None:
    monkeypatch.setenv("XERAY_FALLBACK_API_KEY", "there")
    backend.failure = OverloadedError("no replica", code="no_replica")
    answer = await ask(
        client_of(backend, upstream.url, fallback={"model": "deepseek-chat"}),
        {"Authorization": "Bearer mine", "X-Request-Id": "abc"},
    )
    assert answer.json() == ANSWER
    assert answer.headers["X-XeRay-Served-By"] == "fallback"
    assert upstream.bodies[0]["model"] == "deepseek-chat"
    assert upstream.bodies[0]["messages"] == CHAT["messages"]
    (head,) = upstream.heads
    assert head.startswith(b"POST /v1/chat/completions ")
    assert b"Bearer there" in head
    assert b"mine" not in head
    assert b"abc" in head


async def test_a_stream_is_passed_on_as_it_is(backend, upstream) -> None:
    backend.failure = OverloadedError("no replica")
    answer = await ask(client_of(backend, upstream.url), stream=True)
    assert answer.content == EVENTS
    assert answer.headers["content-type"] == "text/event-stream"


async def test_a_slow_service_sends_requests_away_until_it_is_quick(backend, upstream) -> None:
    client = client_of(backend, upstream.url, fallback={"ttft_p95_limit_ms": 0.000001})
    assert (await ask(client)).headers["X-XeRay-Served-By"] == "local"
    assert (await ask(client)).headers["X-XeRay-Served-By"] == "fallback"


async def test_a_slow_service_still_answers_when_the_upstream_cannot(backend, upstream) -> None:
    upstream.status = 500
    client = client_of(backend, upstream.url, fallback={"ttft_p95_limit_ms": 0.000001})
    await ask(client)
    answer = await ask(client)
    assert (answer.status_code, answer.headers["X-XeRay-Served-By"]) == (200, "local")
    assert len(upstream.bodies) == 1


@pytest.mark.parametrize(
    ("headers", "more"),
    [({"X-XeRay-Local-Only": "true"}, {}), ({}, {"metadata": {"local_only": "true"}})],
)
async def test_a_request_marked_local_only_never_leaves(backend, upstream, headers, more) -> None:
    backend.failure = OverloadedError("no replica", code="no_replica")
    answer = await ask(client_of(backend, upstream.url), headers, **more)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica")
    assert upstream.bodies == []


async def test_a_key_marked_local_only_never_leaves(backend, upstream, tmp_path) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": [{"name": "a", "sha256": digest, "local_only": True}]}))
    backend.failure = OverloadedError("no replica")
    client = client_of(backend, upstream.url, auth={"keys_file": str(path)})
    answer = await ask(client, {"Authorization": "Bearer secret"})
    assert answer.status_code == 503
    assert upstream.bodies == []


async def test_a_key_leaves_with_its_own_models_alone_and_pays(backend, upstream, tmp_path) -> None:
    digest = hashlib.sha256(b"k").hexdigest()
    path = tmp_path / "keys.yaml"
    entry = {"name": "a", "sha256": digest, "models": ["org/tiny"], "tokens_per_minute": 40}
    path.write_text(yaml.safe_dump({"keys": [entry]}))
    backend.failure = OverloadedError("no replica")
    more = {"auth": {"keys_file": str(path)}, "ingress": {"num_replicas": 1}}
    client = client_of(backend, upstream.url, **more)
    headers = {"Authorization": "Bearer k"}
    for model in ("another", "tiny", None):
        assert (await ask(client, headers, model=model)).status_code in (404, 503)
    assert upstream.bodies == []
    answer = await ask(client, headers, model="org/tiny")
    assert answer.headers["X-XeRay-Served-By"] == "fallback"
    assert (
        await ask(client, headers, model="org/tiny")
    ).status_code == 429  # the upstream's 40 tokens count


async def test_a_mistake_of_the_client_stays_here(backend, upstream) -> None:
    answer = await ask(client_of(backend, upstream.url), temperature=9)
    assert answer.status_code == 400
    assert upstream.bodies == []


@pytest.mark.parametrize("status", [401, 500])
async def test_an_upstream_that_refuses_opens_the_circuit(backend, upstream, status: int) -> None:
    upstream.status = status
    backend.failure = OverloadedError("no replica", code="no_replica")
    client = client_of(backend, upstream.url)
    assert (await ask(client)).status_code == 503
    assert (await ask(client)).json()["error"]["code"] == "no_replica"
    assert len(upstream.bodies) == 1


async def test_an_upstream_that_is_not_there_is_a_typed_error(backend) -> None:
    backend.failure = OverloadedError("no replica")
    answer = await ask(client_of(backend, "http://127.0.0.1:9/v1"))
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "overloaded_error"


async def test_a_stream_that_the_upstream_breaks_off_ends_with_an_error(backend, upstream) -> None:
    upstream.cuts = True
    backend.failure = OverloadedError("no replica")
    answer = await ask(client_of(backend, upstream.url), stream=True)
    events = answer.content.strip().split(b"\n\n")
    assert json.loads(events[-2].removeprefix(b"data: "))["error"]["type"] == "server_error"
    assert events[-1] == b"data: [DONE]"


def stream_of(*values: dict[str, Any], ends: bool = True) -> bytes:
    events = [b"data: " + json.dumps(value).encode() for value in values]
    return b"\n\n".join([*events, b"data: [DONE]" if ends else b"", b""])


def choices_of(*choices: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"choices": [choice]} for choice in choices]


async def ask_responses(client: httpx.AsyncClient, **more: Any) -> httpx.Response:
    return await client.post("/v1/responses", json={**RESPONSES, **more})


async def test_responses_go_as_chat_and_come_back_as_responses(backend, upstream) -> None:
    backend.failure = OverloadedError("no replica")
    message = {"role": "assistant", "content": "from afar", "reasoning_content": "hm"}
    upstream.whole = {
        "choices": [{"message": message, "finish_reason": "stop"}],
        "usage": {**USAGE, "completion_tokens_details": {"reasoning_tokens": 4}},
    }
    response = await ask_responses(
        client_of(backend, upstream.url, fallback={"model": "deepseek-chat"})
    )
    answer = response.json()
    assert response.headers["X-XeRay-Served-By"] == "fallback"
    assert (answer["object"], answer["status"], answer["model"]) == (
        "response", "completed", "deepseek-chat",
    )  # fmt: skip
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message"]
    assert answer["output"][1]["content"][0]["text"] == "from afar"
    assert (answer["usage"]["input_tokens"], answer["usage"]["output_tokens"]) == (30, 10)
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] == 4
    assert answer["instructions"] == "Be brief."
    (head,), (body,) = upstream.heads, upstream.bodies
    assert head.startswith(b"POST /v1/chat/completions ")
    assert body == {
        "model": "deepseek-chat",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
        ],
        "max_completion_tokens": 9,
    }


async def test_reasoning_of_earlier_turns_stays_here(backend, upstream) -> None:
    backend.failure = OverloadedError("no replica")
    items = [
        {"type": "message", "role": "user", "content": "hi"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "secret"}]},
        {"type": "message", "role": "assistant", "content": "yo"},
        {"type": "message", "role": "user", "content": "again"},
    ]
    await ask_responses(client_of(backend, upstream.url), input=items)
    assert "secret" not in json.dumps(upstream.bodies)
    assert upstream.bodies[0]["messages"][2] == {"role": "assistant", "content": "yo"}


async def test_a_stream_of_responses_has_their_events(backend, upstream) -> None:
    backend.failure = OverloadedError("no replica")
    upstream.events = stream_of(*choices_of(*DELTAS), {"choices": [], "usage": USAGE})
    response = await ask_responses(client_of(backend, upstream.url), stream=True)
    assert upstream.bodies[0]["stream_options"] == {"include_usage": True}
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    events = [json.loads(block.split("data: ")[1]) for block in blocks]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last["type"] == "response.completed"
    kinds = [item["type"] for item in last["response"]["output"]]
    assert kinds == ["reasoning", "message", "function_call"]
    call = last["response"]["output"][2]
    assert (call["name"], call["call_id"], call["arguments"]) == ("f", "call_1", '{"a": 1}')
    assert last["response"]["usage"]["total_tokens"] == 40


async def test_an_answer_cut_by_its_limit_is_incomplete(backend, upstream) -> None:
    backend.failure = OverloadedError("no replica")
    upstream.whole = {"choices": [{"message": {"content": "fr"}, "finish_reason": "length"}]}
    answer = (await ask_responses(client_of(backend, upstream.url))).json()
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}


@pytest.mark.parametrize(
    "events",
    [
        stream_of(*choices_of(*DELTAS[:3]), ends=False),
        stream_of(*choices_of(*DELTAS[:3]), {"error": {"message": "x"}}),
        stream_of(*choices_of(*DELTAS[:3])) + b"data: {\n\n",
    ],
)
async def test_a_stream_of_responses_that_breaks_off_says_so(backend, upstream, events) -> None:
    backend.failure = OverloadedError("no replica")
    upstream.events = events
    response = await ask_responses(client_of(backend, upstream.url), stream=True)
    last = json.loads(response.text.removesuffix("\n\n").split("\n\n")[-1].split("data: ")[1])
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["output"][1]["content"][0]["text"] == "far", "what there is stays"


@pytest.mark.parametrize("whole", [[], {}, {"choices": [{"message": {"tool_calls": [{}]}}]}])
async def test_an_answer_that_cannot_be_read_is_a_typed_error(backend, upstream, whole) -> None:
    backend.failure = OverloadedError("no replica")
    upstream.whole = whole
    response = await ask_responses(client_of(backend, upstream.url))
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "overloaded_error"


async def test_what_responses_lack_is_told_here(backend, upstream) -> None:
    backend.failure = OverloadedError("no replica")
    client = client_of(backend, upstream.url)
    refused = await ask_responses(client, previous_response_id="resp_1")
    assert refused.json()["error"]["param"] == "previous_response_id"
    kept = await ask_responses(client, metadata={"local_only": "true"})
    assert kept.status_code == 503
    assert upstream.bodies == []


async def test_the_budget_of_an_hour_is_kept(backend, upstream) -> None:
    backend.failure = OverloadedError("no replica", code="no_replica")
    client = client_of(
        backend,
        upstream.url,
        fallback={"budget_per_hour": 0.05, "price_per_1k_tokens": 1.0},
        ingress={"num_replicas": 1},
    )
    served = [(await ask(client)).status_code for _ in range(3)]
    assert served == [200, 200, 503]  # 40 tokens cost 0.04
    assert len(upstream.bodies) == 2


def test_the_circuit_opens_probes_and_closes() -> None:
    clock = Clock()
    breaker = CircuitBreaker(threshold=2, open_s=10, clock=clock)
    breaker.failed()
    assert breaker.state is CircuitState.CLOSED
    breaker.failed()
    assert breaker.state is CircuitState.OPEN
    assert not breaker.try_enter()
    clock.now_s += 10
    assert breaker.try_enter()
    assert not breaker.try_enter()  # one probe at a time
    breaker.failed()
    assert breaker.state is CircuitState.OPEN
    clock.now_s += 10
    assert breaker.try_enter()
    breaker.abandoned()  # the client left: the next may probe
    assert breaker.try_enter()
    breaker.succeeded()
    assert breaker.state is CircuitState.CLOSED


def test_the_p95_forgets_what_is_old_and_needs_samples() -> None:
    clock = Clock()
    latency = SlidingLatency(window_s=60, min_samples=20, clock=clock)
    for _ in range(19):
        latency.observe(0.1)
    assert latency.p95_s() is None
    latency.observe(5.0)
    assert latency.p95_s() == 0.1  # one of twenty is the slowest 5 %
    latency.observe(5.0)
    assert latency.p95_s() == 5.0
    clock.now_s += 61
    assert latency.p95_s() is None


def test_an_hour_later_the_budget_is_whole_again() -> None:
    clock = Clock()
    budget = HourlyBudget(1.0, price_per_1k_tokens=1.0, clock=clock)
    budget.charge(1000)
    assert not budget.has_room()
    clock.now_s += 3601
    assert budget.has_room()
    assert budget.spent() == 0.0
