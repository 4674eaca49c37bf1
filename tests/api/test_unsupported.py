"""Parameters that this server or its engine lacks are refused by name; the rest is told once."""

from __future__ import annotations

import logging

import pytest

from serve_app.core.events import EngineCapabilities

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def error_of(response) -> dict:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["code"], str)
    return body["error"]


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (CHAT, {"functions": [{}]}),
        (CHAT, {"response_format": {"type": "json_object"}}),
        (CHAT, {"thinking_budget": 10}),
        (CHAT, {"audio": {"voice": "x"}}),
        (CHAT, {"modalities": ["text", "audio"]}),
        (CHAT, {"prediction": {"type": "content"}}),
        (CHAT, {"web_search_options": {}}),
        (CHAT, {"guided_json": {}}),
        (CHAT, {"chat_template": "x"}),
        ("/v1/completions", {"suffix": "x"}),
        ("/v1/completions", {"prompt_embeds": "x"}),
        ("/v1/completions", {"best_of": 3}),
        ("/generate", {"n": 2}),
    ],
)
async def test_known_but_unsupported_parameters_are_named(client, path, extra):
    body = {**HELLO, **extra} if path == CHAT else {"prompt": "x", **extra}
    error = error_of(await client.post(path, json=body))
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == next(iter(extra))


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp-1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"include": [[]]}, "include"),
        ({"n": 2}, "n"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.content.0.type",
        ),
    ],
)
async def test_what_responses_lack_is_named(client, backend, extra, param):
    error = error_of(await client.post(RESPONSES, json={"input": "x", **extra}))
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)
    assert backend.requests == []


async def test_what_asks_responses_for_nothing_passes(client):
    harmless = {
        "store": False,
        "background": False,
        "previous_response_id": None,
        "truncation": "disabled",
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"summary": "auto"},
        "service_tier": "auto",
        "text": {"verbosity": "medium", "format": {"type": "text"}},
        "tools": [],
    }
    assert (await client.post(RESPONSES, json={"input": "x", **harmless})).status_code == 200


async def test_image_parts_are_named(client):
    part = {"type": "image_url", "image_url": {"url": "http://x"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
    error = error_of(await client.post(CHAT, json={"messages": messages}))
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == "messages.0.content.1.type"


@pytest.mark.parametrize(
    "harmless",
    [
        {"tools": []},
        {"tools": None},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"metadata": {"a": "b"}, "store": True, "service_tier": "auto", "user": "u"},
        {"parallel_tool_calls": False},
    ],
)
async def test_values_that_ask_for_nothing_pass(client, harmless):
    assert (await client.post(CHAT, json={**HELLO, **harmless})).status_code == 200


@pytest.mark.parametrize(
    ("lacking", "body", "param"),
    [
        ({"logprobs": False}, {"logprobs": True}, "logprobs"),
        ({"top_logprobs": False}, {"logprobs": True, "top_logprobs": 1}, "top_logprobs"),
        ({"logit_bias": False}, {"logit_bias": {"5": 1}}, "logit_bias"),
        ({"penalties": False}, {"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"penalties": False}, {"repetition_penalty": 1.5}, "repetition_penalty"),
        ({"min_p": False}, {"min_p": 0.1}, "min_p"),
        ({"seed": False}, {"seed": 1}, "seed"),
        ({"min_tokens": False}, {"min_tokens": 1}, "min_tokens"),
        ({"cache_salt": False}, {"cache_salt": "x"}, "cache_salt"),
    ],
)
async def test_what_the_engine_lacks_is_refused_by_name(client, backend, lacking, body, param):
    backend.engine = EngineCapabilities(**lacking)
    error = error_of(await client.post(CHAT, json={**HELLO, **body}))
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)
    neutral = {"frequency_penalty": 0, "repetition_penalty": 1, "min_p": 0, "min_tokens": 0}
    assert (await client.post(CHAT, json={**HELLO, **neutral})).status_code == 200


async def test_echo_logprobs_need_prompt_logprobs(client, backend):
    backend.engine = EngineCapabilities(prompt_logprobs=False)
    body = {"prompt": "x", "echo": True, "logprobs": 1}
    error = error_of(await client.post("/v1/completions", json=body))
    assert (error["code"], error["param"]) == ("unsupported_parameter", "logprobs")


async def test_unknown_keys_are_ignored_and_logged_once(client, caplog):
    body = {**HELLO, "frobnicate_this": "secret value"}
    with caplog.at_level(logging.WARNING, logger="serve_app"):
        for _ in range(3):
            assert (await client.post(CHAT, json=body)).status_code == 200
    lines = [record.getMessage() for record in caplog.records]
    assert sum("frobnicate_this" in line for line in lines) == 1
    assert "secret value" not in caplog.text


async def test_unknown_keys_inside_objects_are_logged_and_unsupported_ones_named(client, caplog):
    message = {"role": "user", "content": "x", "frobnicate_that": 1}
    with caplog.at_level(logging.WARNING, logger="serve_app"):
        assert (await client.post(CHAT, json={"messages": [message]})).status_code == 200
    assert "frobnicate_that" in caplog.text
    old = {"role": "assistant", "content": "", "function_call": {"name": "f"}}
    error = error_of(await client.post(CHAT, json={"messages": [message, old]}))
    assert (error["code"], error["param"]) == ("unsupported_parameter", "messages.1.function_call")
