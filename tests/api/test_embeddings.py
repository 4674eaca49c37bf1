"""POST /v1/embeddings in-process: its forms, its limits, and models that are none for it."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from dataclasses import replace

import pytest

from serve_app.api.embedding_output import MAX_IN_FLIGHT
from serve_app.core.errors import EngineError, OverloadedError
from serve_app.core.events import EngineCapabilities
from serve_app.core.requests import GenerateChunk

PATH = "/v1/embeddings"
VECTOR = (3.0, 4.0, 0.0, 12.0)


def chunk(*values: float) -> GenerateChunk:
    data = struct.pack(f"<{len(values)}f", *values)
    return GenerateChunk(finish_reason="length", embedding=data)


@pytest.fixture(autouse=True)
def embeds(backend, fakes):
    """The fake backend serves a model for embeddings, each input with the same vector."""
    backend.cards = [replace(fakes["CARD"], embedding_size=4, can_shorten_embeddings=True)]
    backend.engine = EngineCapabilities(generation=False, embeddings=True, tools=False)
    backend.script = [chunk(*VECTOR)]
    return backend


def error_of(response) -> dict:
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    return {"status": response.status_code, "param": error["param"], "code": error["code"]}


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        ("hello", [b"hello"]),
        (["hello", "you"], [b"hello", b"you"]),
        ([104, 105], [b"hi"]),
        ([[104], [105, 106]], [b"h", b"ij"]),
    ],
)
async def test_each_form_of_input(client, backend, given, ids):
    response = await client.post(PATH, json={"model": "tiny", "input": given})
    answer = response.json()
    assert [request.prompt_token_ids for request in backend.requests] == [tuple(i) for i in ids]
    assert all(request.sampling.embeds for request in backend.requests)
    assert answer == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": list(VECTOR)} for i in range(len(ids))
        ],
        "model": "org/tiny",
        "usage": {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))},
    }


async def test_base64_holds_the_float32_values(client):
    response = await client.post(PATH, json={"input": "x", "encoding_format": "base64"})
    (entry,) = response.json()["data"]
    assert struct.unpack("<4f", base64.b64decode(entry["embedding"])) == VECTOR


async def test_vectors_are_shortened_and_scaled_where_the_model_allows_it(client, backend):
    response = await client.post(PATH, json={"input": "x", "dimensions": 2})
    assert response.json()["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
    whole = await client.post(PATH, json={"input": "x", "dimensions": 4})
    assert whole.json()["data"][0]["embedding"] == list(VECTOR)
    backend.cards = [replace(backend.cards[0], can_shorten_embeddings=False)]
    refused = await client.post(PATH, json={"input": "x", "dimensions": 2})
    assert error_of(refused) == {
        "status": 400, "param": "dimensions", "code": "unsupported_parameter",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": ""}, "input", "invalid_value"),
        ({"input": ["a", ""]}, "input.1", "invalid_value"),
        ({"input": [300]}, "input", "invalid_value"),
        ({"input": [[1], [300]]}, "input.1", "invalid_value"),
        ({"input": ["a"] * 2049}, "input", "invalid_value"),
        ({"input": "a" * 65}, "input", "context_length_exceeded"),
        ({"input": ["a", "a" * 65]}, "input.1", "context_length_exceeded"),
        ({"input": ["a" * 60] * 20}, "input", "invalid_value"),
        ({"input": "a", "dimensions": 5}, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"input": "a", "model": "other"}, "model", "model_not_found"),
        (
            {"input": "a", "truncate_prompt_tokens": 3},
            "truncate_prompt_tokens",
            "unsupported_parameter",
        ),
    ],
)
async def test_what_is_wrong_is_named_and_reaches_no_engine(
    make_client, backend, body, param, code
):
    response = await make_client(max_embedding_tokens=1000).post(PATH, json=body)
    told = error_of(response)
    assert (told["param"], told["code"]) == (param, code)
    assert told["status"] == (404 if code == "model_not_found" else 400)
    assert backend.requests == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
        ("/generate", {"prompt": "hi"}),
    ],
)
async def test_an_embedding_model_generates_nothing(client, backend, path, body):
    response = await client.post(path, json=body)
    assert error_of(response) == {
        "status": 400, "param": "model", "code": "unsupported_parameter",
    }  # fmt: skip
    assert backend.requests == []


async def test_a_model_that_generates_computes_no_embeddings(client, backend, fakes):
    backend.cards = [fakes["CARD"]]
    response = await client.post(PATH, json={"input": "hi"})
    assert error_of(response) == {
        "status": 400, "param": "model", "code": "unsupported_parameter",
    }  # fmt: skip
    assert backend.requests == []


async def test_the_model_list_tells_what_a_model_is_for(client, backend, fakes):
    backend.cards += [replace(fakes["CARD"], id="chatty", aliases=(), tool_syntax="hermes")]
    listed = (await client.get("/v1/models")).json()["data"]
    told = {entry["id"]: entry["capabilities"] for entry in listed}
    assert told["tiny"] == ["embeddings"]
    assert told["chatty"] == ["completions", "chat", "tools"]


async def test_a_long_list_never_fills_the_replicas_queue(make_app, backend, fakes):
    gate = asyncio.Event()
    backend.script = [gate, chunk(*VECTOR)]
    exchange = fakes["Exchange"](make_app(), PATH, {"input": ["ab"] * 40})
    running = asyncio.create_task(exchange.run())
    await backend.started.wait()
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(backend.requests) == MAX_IN_FLIGHT
    gate.set()
    await running
    answer = json.loads(exchange.text)
    assert [entry["index"] for entry in answer["data"]] == list(range(40))
    assert answer["usage"]["total_tokens"] == 80


async def test_a_client_that_leaves_aborts_what_runs_and_starts_no_more(make_app, backend, fakes):
    backend.script = [asyncio.Event()]
    exchange = fakes["Exchange"](make_app(), PATH, {"input": ["ab"] * 40})
    running = asyncio.create_task(exchange.run())
    await backend.started.wait()
    exchange.disconnect()
    await running
    assert exchange.sent == []
    assert len(backend.closed) == len(backend.requests) == MAX_IN_FLIGHT


@pytest.mark.parametrize(
    ("step", "status", "code"),
    [
        (EngineError("gone"), 500, "internal_error"),
        (OverloadedError("full"), 503, "queue_full"),
        (GenerateChunk(error=OverloadedError("full").info()), 503, "queue_full"),
        (GenerateChunk(finish_reason="length"), 500, "internal_error"),
    ],
)
async def test_one_failure_is_the_answer_and_the_others_are_closed(
    client, backend, step, status, code
):
    backend.scripts = [[chunk(*VECTOR)], [step]]
    response = await client.post(PATH, json={"input": ["a", "b", "c"]})
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert ("retry-after" in response.headers) == (status == 503)
    assert len(backend.closed) == 3
    metrics = (await client.get("/metrics")).text
    assert 'finished_reason="error"' in metrics


async def test_a_deadline_is_a_504(make_client, backend):
    backend.script = [asyncio.Event()]
    client = make_client(request_timeout_s=0.05)
    response = await client.post(PATH, json={"input": "x"})
    assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")
