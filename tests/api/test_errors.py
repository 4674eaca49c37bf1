"""Each row of the error table, and every way in which a request can be at fault."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace

import pytest

from serve_app.core.errors import (
    AuthenticationError,
    ClientError,
    ConfigError,
    DeadlineError,
    EngineError,
    OverloadedError,
    PermissionDeniedError,
    RateLimitError,
    XeRayError,
)
from serve_app.core.requests import GenerateChunk, PreparedPrompt

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def error_of(response) -> dict:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["code"], str)
    return body["error"]


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "retry"),
    [
        (ClientError("no"), 400, "invalid_request_error", "invalid_value", None),
        (AuthenticationError("no"), 401, "authentication_error", "invalid_api_key", None),
        (PermissionDeniedError("no"), 403, "permission_error", "not_allowed", None),
        (
            RateLimitError("no", retry_after_s=7.2),
            429,
            "rate_limit_error",
            "rate_limit_exceeded",
            "true",
        ),
        (EngineError("no"), 500, "server_error", "internal_error", "true"),
        (
            OverloadedError("no", code="model_loading"),
            503,
            "overloaded_error",
            "model_loading",
            "true",
        ),
        (OverloadedError("no", code="no_replica"), 503, "overloaded_error", "no_replica", "true"),
        (DeadlineError("no"), 504, "timeout_error", "deadline_exceeded", "false"),
        (ConfigError("/etc/secret is bad"), 500, "server_error", "internal_error", "false"),
        (ValueError("secret"), 500, "server_error", "internal_error", "false"),
    ],
)
@pytest.mark.parametrize("place", ["capabilities", "raised", "chunk"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_errors_before_the_first_token_have_their_status(
    client, backend, error, status, kind, code, retry, place, streamed
):
    travels = isinstance(error, XeRayError) and not isinstance(error, ConfigError)
    if place == "capabilities":
        backend.failure = error
    elif place == "chunk" and travels:
        backend.script = [GenerateChunk(error=error.info())]
    else:
        backend.script = [error]
    response = await client.post(CHAT, json={**HELLO, "stream": streamed})
    assert response.status_code == status
    shown = error_of(response)
    assert (shown["type"], shown["code"]) == (kind, code)
    assert "secret" not in response.text
    assert response.headers["content-type"] == "application/json"
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
        assert int(response.headers["retry-after-ms"]) >= 1
    assert response.headers.get("x-should-retry") == retry
    if status == 401:
        assert response.headers["www-authenticate"] == "Bearer"
    if status == 500:
        assert response.headers["x-request-id"] in shown["message"]


async def test_error_after_the_first_token_is_an_event(client, backend, fakes):
    backend.script = [fakes["chunks"]("Hel")[0], EngineError("The card was lost.")]
    response = await client.post(CHAT, json={**HELLO, "stream": True})
    assert response.status_code == 200
    *_, error, done = response.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    shown = json.loads(error.removeprefix("data: "))["error"]
    assert shown["code"] == "internal_error"
    assert shown["message"].startswith("The card was lost.")
    assert '"content":"Hel"' in response.text


async def test_text_beside_an_error_is_not_lost(client, backend, fakes):
    last = GenerateChunk(text="lo", num_prompt=5, num_generated=2, error=EngineError("x").info())
    backend.script = [fakes["chunks"]("Hel")[0], last]
    response = await client.post(CHAT, json={**HELLO, "stream": True})
    assert '"content":"lo"' in response.text


@pytest.mark.parametrize("reason", ["aborted", "error"])
async def test_sequence_ended_by_the_server_is_no_success(client, backend, reason):
    backend.script = [GenerateChunk(finish_reason=reason)]
    assert (await client.post(CHAT, json=HELLO)).status_code == 500


async def test_sequence_without_an_end_is_an_error(client, backend, fakes):
    backend.script = fakes["chunks"]("Hel")[:1]
    assert (await client.post(CHAT, json=HELLO)).status_code == 500


async def test_one_failing_choice_fails_the_answer_and_closes_the_other(client, backend, fakes):
    backend.scripts = [[asyncio.Event()], [OverloadedError("full")]]
    response = await client.post(CHAT, json={**HELLO, "n": 2})
    assert response.status_code == 503
    assert len(backend.closed) == 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ("{", None),
        ("", None),
        ("[1]", None),
        ("\xff", None),
        ('{"messages": ' + "[" * 300 + "]" * 300 + "}", None),
        ("{}", "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages.0.content.0.type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text",
        ),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({**HELLO, "temperature": 3}, "temperature"),
        ({**HELLO, "temperature": "hot"}, "temperature"),
        ({**HELLO, "top_p": -1}, "top_p"),
        ({**HELLO, "n": 0}, "n"),
        ({**HELLO, "n": 17}, "n"),
        ({**HELLO, "max_tokens": 0}, "max_tokens"),
        ({**HELLO, "max_tokens": True}, "max_tokens"),
        ({**HELLO, "max_tokens": 2.5}, "max_tokens"),
        ({**HELLO, "seed": 2**64}, "seed"),
        ({**HELLO, "stop": [""]}, "stop.0"),
        ({**HELLO, "stop": ["x"] * 17}, "stop"),
        ({**HELLO, "stop": 5}, "stop"),
        ({**HELLO, "logit_bias": {"x": 1}}, "logit_bias"),
        ({**HELLO, "logit_bias": {"5": 101}}, "logit_bias.5"),
        ({**HELLO, "logit_bias": {"999": 1}}, "logit_bias"),
        ({**HELLO, "stop_token_ids": [300]}, "stop_token_ids"),
        ({**HELLO, "top_logprobs": 2}, "top_logprobs"),
        ({**HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({**HELLO, "stream_options": {"include_usage": True}}, "stream_options"),
        ({**HELLO, "min_tokens": 9, "max_tokens": 5}, "min_tokens"),
        (
            {**HELLO, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
    ],
)
async def test_faulty_chat_request_names_the_parameter(client, backend, body, param):
    content = body.encode("latin-1") if isinstance(body, str) else json.dumps(body).encode()
    response = await client.post(CHAT, content=content)
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_value"
    assert error["param"] == param
    assert "wizard" not in response.text
    assert "hot" not in response.text
    assert backend.requests == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["x", ""]}, "prompt.1"),
        ({"prompt": [[1], []]}, "prompt.1"),
        ({"prompt": [1, "x"]}, "prompt.1"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["x"] * 257}, "prompt"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ],
)
async def test_faulty_completion_request_names_the_parameter(client, backend, body, param):
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert backend.requests == []


async def test_faults_are_capped_and_never_echo_the_input(client):
    messages = [{"role": f"secret-{place}", "content": "x"} for place in range(50)]
    others = {"temperature": 9, "top_p": 9, "n": 0, "seed": "secret"}
    response = await client.post(CHAT, json={"messages": messages, **others})
    assert "secret" not in response.text
    # Of a list only the first fault is told: looking for all of them could take seconds.
    assert "and 2 more" in error_of(response)["message"]
    assert len(error_of(response)["message"]) <= 500


@pytest.mark.parametrize(
    ("content", "max_tokens", "param"),
    [("x" * 64, None, "messages"), ("x" * 60, 5, "max_tokens"), ("x" * 99, 1, "messages")],
)
async def test_context_overflow(client, backend, content, max_tokens, param):
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
    error = error_of(await client.post(CHAT, json=body))
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert "64" in error["message"]
    assert backend.requests == []


async def test_prompt_that_just_fits(client, backend):
    body = {"messages": [{"role": "user", "content": "x" * 60}], "max_tokens": 4}
    assert (await client.post(CHAT, json=body)).status_code == 200


async def test_template_error_comes_from_the_preparation(client, backend, monkeypatch):
    fault = ClientError("roles must alternate", param="messages").info()

    async def refuse(model_id, request):
        return PreparedPrompt(error=fault)

    monkeypatch.setattr(backend, "prepare", refuse)
    response = await client.post(CHAT, json=HELLO)
    assert response.status_code == 400
    assert error_of(response)["message"] == "roles must alternate"


async def test_unknown_model(client):
    response = await client.post(CHAT, json={**HELLO, "model": "secret-name"})
    assert response.status_code == 404
    error = error_of(response)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error["type"] == "not_found_error"
    assert "org/tiny" in error["message"]
    assert "secret" not in error["message"]


async def test_star_accepts_any_name(client, backend, fakes):
    backend.cards = [replace(fakes["CARD"], aliases=("*",))]
    response = await client.post(CHAT, json={**HELLO, "model": "whatever"})
    assert response.json()["model"] == "org/tiny"


@pytest.mark.parametrize("path", ["/nope", "/v1", "/v1/chat/completions/", "/static/nope.js"])
async def test_unknown_route(client, path):
    response = await client.get(path)
    assert response.status_code == 404
    assert error_of(response)["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("GET", CHAT, "POST"), ("DELETE", "/v1/models/org/tiny", "GET"), ("PUT", "/health", "GET")],
)
async def test_wrong_method(client, method, path, allow):
    response = await client.request(method, path)
    assert response.status_code == 405
    assert allow in response.headers["allow"]
    assert error_of(response)["code"] == "method_not_allowed"


async def test_messages_of_server_errors_lose_paths_and_tracebacks(client, backend):
    backend.script = [EngineError("read /usr/lib/model/x.bin failed\nTraceback: line 1")]
    error = error_of(await client.post(CHAT, json=HELLO))
    assert error["message"].startswith("read <path> failed")
    assert "Traceback" not in error["message"]


async def test_long_messages_are_capped(client, backend):
    backend.script = [ClientError("x" * 5000)]
    assert len(error_of(await client.post(CHAT, json=HELLO))["message"]) == 500


async def test_bugs_are_logged_with_their_traceback(client, backend, caplog):
    backend.script = [ZeroDivisionError("boom")]
    with caplog.at_level(logging.ERROR, logger="serve_app"):
        await client.post(CHAT, json=HELLO)
    assert any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": HELLO["messages"]}])
async def test_tokenize_takes_exactly_one_input(client, body):
    response = await client.post("/tokenize", json=body)
    assert response.status_code == 400
    error_of(response)


async def test_detokenize_checks_ids(client):
    response = await client.post("/detokenize", json={"tokens": [300]})
    assert error_of(response)["param"] == "tokens"
