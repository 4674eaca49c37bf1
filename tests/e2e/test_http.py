"""What only shows over a socket: errors of every kind, load, disconnects, metrics, open ports."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

NUM_STREAMS = 64
METRIC_NAMES = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "iteration_tokens_total_bucket",
}
UNPREFIXED_METRIC_NAMES = {"memory_bandwidth_bytes", "inference_latency_seconds_bucket"}


def samples(url: str) -> dict[str, float]:
    """Sample name → sum over its labels."""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """Poll a condition of another process. Raises AssertionError when it does not come true."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.1)


def has_no_block_in_use(url: str) -> bool:
    totals = samples(url)
    return (
        totals["xeray_kv_cache_usage_perc"] == 0.0
        and totals["xeray_num_requests_running"] == 0.0
        and totals["xeray_num_requests_waiting"] == 0.0
    )


def chat_body(model: str, prompt: str, **changes: Any) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 24,
        **changes,
    }


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "error_type", "code"),
    [
        ("GET", "/nowhere", b"", 404, "not_found_error", "not_found"),
        ("GET", "/v1/chat/completions", b"", 405, "invalid_request_error", "method_not_allowed"),
        ("POST", "/v1/chat/completions", b"{", 400, "invalid_request_error", "invalid_value"),
        ("POST", "/v1/chat/completions", b"[1]", 400, "invalid_request_error", "invalid_value"),
        (
            "POST",
            "/v1/chat/completions",
            b'{"model": "' + b"x" * (5 << 20) + b'"}',
            413,
            "invalid_request_error",
            "request_too_large",
        ),
        (
            "POST",
            "/v1/embeddings",
            b'{"input": "x"}',
            400,
            "invalid_request_error",
            "unsupported_parameter",
        ),
    ],
)
def test_error_table(
    service: Any,
    method: str,
    path: str,
    content: bytes,
    status: int,
    error_type: str,
    code: str,
) -> None:
    headers = {"Content-Type": "application/json", "X-Request-Id": "e2e-1"}
    response = httpx.request(method, f"{service.url}{path}", content=content, headers=headers)

    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (error_type, code)
    assert response.headers["x-request-id"] == "e2e-1"
    assert "Traceback" not in response.text


def test_probes(service: Any) -> None:
    for path in ("/health", "/livez", "/readyz", "/version"):
        assert httpx.get(f"{service.url}{path}").status_code == 200, path


def test_a_client_cannot_move_serves_own_deadline(service: Any) -> None:
    headers = {"X-Request-Timeout-Seconds": "0.001"}
    answer = httpx.post(
        f"{service.url}/generate",
        json={"prompt": "Hi", "max_tokens": 4, "ignore_eos": True},
        headers=headers,
    )
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 4)


def test_pages_use_nothing_from_elsewhere(service: Any) -> None:
    page = httpx.get(f"{service.url}/")

    assert page.status_code == 200
    assert "text/html" in page.headers["content-type"]
    assert "https://" not in page.text
    assert httpx.get(f"{service.url}/openapi.json").json()["openapi"].startswith("3.")


def test_stream_framing(service: Any, model: str) -> None:
    body = chat_body(model, "What is the capital of France?", stream=True)
    with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        data = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]

    chunks = [json.loads(line) for line in data[:-1]]
    assert data[-1] == "[DONE]"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] is not None
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])


def test_generate_and_tokenize(service: Any, model: str) -> None:
    generated = httpx.post(
        f"{service.url}/generate",
        json={"prompt": "The capital of France is", "temperature": 0, "max_tokens": 8},
    ).json()
    assert "Paris" in generated["text"]

    tokens = httpx.post(
        f"{service.url}/tokenize", json={"model": model, "prompt": "Hello, world"}
    ).json()["tokens"]
    text = httpx.post(f"{service.url}/detokenize", json={"model": model, "tokens": tokens}).json()[
        "prompt"
    ]
    assert text == "Hello, world"


def test_metric_names(service: Any, model: str) -> None:
    body = chat_body(model, "Hello")
    assert httpx.post(f"{service.url}/v1/chat/completions", json=body).status_code == 200

    names = set(samples(service.url))
    assert {f"xeray_{name}" for name in METRIC_NAMES} <= names
    assert names >= UNPREFIXED_METRIC_NAMES


def test_counters_move_with_requests(service: Any, model: str) -> None:
    before = samples(service.url)
    answer = httpx.post(
        f"{service.url}/v1/chat/completions", json=chat_body(model, "Count to five."), timeout=60
    ).json()
    generated = answer["usage"]["completion_tokens"]

    def has_moved() -> bool:
        now = samples(service.url)
        name = "xeray_generation_tokens_total"
        return now[name] - before[name] >= generated

    wait_for(has_moved, "the token counter did not move")


def test_the_logs_of_a_request_carry_its_id_in_every_process_and_no_prompt(
    service: Any, model: str
) -> None:
    body = chat_body(model, "What is a quokkaberry?", max_tokens=4)
    answer = httpx.post(
        f"{service.url}/v1/chat/completions",
        json=body,
        headers={"X-Request-Id": "followed-1"},
        timeout=60,
    )
    assert answer.headers["X-Request-Id"] == "followed-1"

    def messages() -> dict[str, str]:
        lines = [line for line in service.log_lines() if line.get("request_id") == "followed-1"]
        return {line["logger"]: line["message"] for line in lines}

    wait_for(lambda: len(messages()) == 3, f"no line of each process: {messages()}")
    seen = messages()
    num_tokens = answer.json()["usage"]["prompt_tokens"]
    assert seen["serve_app.access"].startswith("POST /v1/chat/completions 200 ")
    assert seen["serve_app.deployments.preprocessor"] == f"prepared: {num_tokens} prompt tokens"
    ended = seen["serve_app.observability.generation_span"]
    assert ended.startswith(f"ended: {num_tokens} prompt tokens")
    assert not [line for line in service.log_lines() if "quokkaberry" in json.dumps(line)]


async def stream_tokens(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[bytes, ...]:
    """The bytes of each token of a stream; AssertionError unless it ended as it should.

    In a byte-level vocabulary no two ordinary tokens are the same bytes: equal bytes, token by
    token, are equal ids, which equal text is not.
    """
    pieces: list[str] = []
    tokens: list[bytes] = []
    is_done = False
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                is_done = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                assert "error" not in event, event
                choice = event["choices"][0]
                pieces.append(choice["delta"].get("content") or "")
                for item in (choice.get("logprobs") or {}).get("content") or ():
                    tokens.append(bytes(item["bytes"]))
    assert is_done
    text = "".join(pieces).encode()
    assert text in b"".join(tokens), "the tokens are those of the text"
    return tuple(tokens)


@contextlib.asynccontextmanager
async def connection(url: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=NUM_STREAMS)
    async with httpx.AsyncClient(base_url=url, timeout=170, limits=limits) as http:
        yield http


@pytest.mark.timeout(400)
async def test_64_streams_at_once_give_what_each_gives_alone(service: Any, model: str) -> None:
    prompts = [f"Write one sentence about the number {number}." for number in range(NUM_STREAMS)]
    bodies = [chat_body(model, prompt, stream=True) for prompt in prompts]
    for number, body in enumerate(bodies):
        body["logprobs"] = True
        if number % 2:
            body.update(temperature=0.8, top_p=0.9, seed=number)  # the others are greedy
    async with connection(service.url) as http:
        together = await asyncio.gather(*(stream_tokens(http, body) for body in bodies))
        alone = [await stream_tokens(http, body) for body in bodies]

    assert together == alone
    assert len(set(together)) > NUM_STREAMS // 2, "the answers do not tell the prompts apart"
    wait_for(lambda: has_no_block_in_use(service.url), "blocks stayed in use")


@pytest.mark.parametrize("is_streaming", [True, False])
async def test_a_client_that_leaves_frees_its_blocks(
    service: Any, model: str, is_streaming: bool
) -> None:
    body = chat_body(
        model, "Tell a very long story.", stream=is_streaming, max_tokens=4000, ignore_eos=True
    )
    before = samples(service.url)["xeray_num_aborted_total"]
    async with connection(service.url) as http:
        request = asyncio.create_task(http.post("/v1/chat/completions", json=body))
        while samples(service.url)["xeray_num_requests_running"] == 0.0:
            assert not request.done()
            await asyncio.sleep(0.05)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    wait_for(lambda: has_no_block_in_use(service.url), "blocks stayed in use after a disconnect")
    assert samples(service.url)["xeray_num_aborted_total"] == before + 1


def test_only_the_engine_and_the_command_itself_may_interrupt_others(service: Any) -> None:
    policies: dict[str, set[int]] = {"engine": set(), "command": set(), "others": set()}
    for process in service.processes():
        is_engine = "serve_app.engine.worker" in process.cmdline()
        kind = (
            "engine" if is_engine else "command" if process.pid == service.process.pid else "others"
        )
        policies[kind].add(os.sched_getscheduler(process.pid))

    usual = {os.SCHED_OTHER}
    assert policies == {"engine": usual, "command": usual, "others": {os.SCHED_BATCH}}


def is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def test_everything_listens_on_loopback_only(service: Any) -> None:
    listening = {
        (process.name(), connection.laddr.ip, connection.laddr.port)
        for process in service.processes()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }

    assert ("127.0.0.1", service.port) in {(ip, port) for _, ip, port in listening}
    outside = {each for each in listening if not is_loopback(each[1])}
    assert not outside
