from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.cli.chat_client import (
    ChatClient,
    Piece,
    TurnStats,
    connect,
    default_model,
    sse_events,
)
from serve_app.core.errors import XeRayError

Handler = Callable[[httpx.Request], httpx.Response]
USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 8},
    "completion_tokens_details": {"reasoning_tokens": 2},
}


def sse(*events: dict[str, Any], is_done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return "".join([*lines, "data: [DONE]\n\n" if is_done else ""]).encode()


def delta(finish_reason: str | None = None, **fields: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


def client(handler: Handler, **parameters: Any) -> ChatClient:
    http = connect("http://server:8000", "key", transport=httpx.MockTransport(handler))
    ticks = iter(range(1000))
    return ChatClient(http, "m", parameters, clock=lambda: float(next(ticks)))


def stream(content: bytes, status: int = 200) -> tuple[list[Piece], TurnStats]:
    stats = TurnStats()
    chat = client(lambda _: httpx.Response(status, content=content))
    return list(chat.stream([{"role": "user", "content": "hi"}], stats)), stats


def test_pieces_of_an_answer() -> None:
    pieces, stats = stream(
        sse(
            delta(role="assistant", content=""),
            delta(reasoning_content="hm"),
            delta(content="Par"),
            delta(content="is"),
            delta(finish_reason="stop"),
            {"choices": [], "usage": USAGE},
        )
    )

    assert pieces == [Piece("hm", is_reasoning=True), Piece("Par"), Piece("is")]
    assert stats.finish_reason == "stop"
    assert (stats.num_prompt_tokens, stats.num_cached_tokens) == (12, 8)
    assert (stats.num_completion_tokens, stats.num_reasoning_tokens) == (5, 2)


def test_times_and_rate() -> None:
    # The scripted clock ticks once per reading: start 0, first piece 1, end 2.
    _, stats = stream(sse(delta(content="a"), delta(content="b"), {"choices": [], "usage": USAGE}))

    assert (stats.ttft_s, stats.total_s) == (1.0, 2.0)
    assert stats.tokens_per_s == 4.0
    assert "4.0 tokens/s" in stats.line()


def test_an_answer_without_tokens_has_no_rate() -> None:
    _, stats = stream(sse(delta(finish_reason="stop")))

    assert stats.ttft_s is None
    assert stats.tokens_per_s is None
    assert stats.line().startswith("TTFT - · - · 0 tokens")


def test_the_request() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, content=sse())

    list(client(handler, temperature=0.0).stream([{"role": "user", "content": "hi"}], TurnStats()))

    body = json.loads(seen[0].content)
    assert seen[0].url.path == "/v1/chat/completions"
    assert seen[0].headers["authorization"] == "Bearer key"
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["temperature"] == 0.0


def test_a_refusal_shows_the_servers_message() -> None:
    body = json.dumps({"error": {"message": "max_tokens must be ≥ 1"}}).encode()

    with pytest.raises(XeRayError, match="answered 400: max_tokens must be ≥ 1"):
        stream(body, status=400)


def test_an_error_in_the_middle_of_a_stream() -> None:
    with pytest.raises(XeRayError, match="broke off: the engine died"):
        stream(sse(delta(content="a"), {"error": {"message": "the engine died"}}))


def test_a_stream_that_just_ends_is_an_error() -> None:
    with pytest.raises(XeRayError, match="before the answer was complete"):
        stream(sse(delta(content="a"), is_done=False))


def test_no_server() -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(XeRayError, match="xeray serve"):
        default_model(client(refuse).http)


def test_the_first_model_is_the_default() -> None:
    models = {"data": [{"id": "org/first"}, {"id": "second"}]}
    assert default_model(client(lambda _: httpx.Response(200, json=models)).http) == "org/first"


@pytest.mark.parametrize("answer", [{}, {"data": []}, [], {"data": [{}]}])
def test_what_is_no_openai_server(answer: Any) -> None:
    with pytest.raises(XeRayError, match="check --url"):
        default_model(client(lambda _: httpx.Response(200, json=answer)).http)


@pytest.mark.parametrize(
    "url", ["http://host:1/v1", "http://host:1/v1/", "http://host:1", "host:1/", "host:1"]
)
def test_urls_people_write(url: str) -> None:
    assert str(connect(url, None).base_url) == "http://host:1"


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=5)), max_size=5))
def test_sse_survives_comments_and_blank_lines(events: list[dict[str, str]]) -> None:
    lines: list[str] = []
    for event in events:
        lines += [": keep-alive", "", f"data: {json.dumps(event)}", ""]
    lines += ["data: [DONE]", "", "data: never read"]

    assert list(sse_events(iter(lines))) == events


@pytest.mark.parametrize("data", ["{", "[]", "null"])
def test_an_event_that_is_no_object_is_an_error(data: str) -> None:
    with pytest.raises(XeRayError, match="no JSON object"):
        list(sse_events(iter([f"data: {data}", "data: [DONE]"])))
