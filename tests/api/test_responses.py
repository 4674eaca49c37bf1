"""POST /v1/responses: the translation onto chat, the typed events, errors, the openai package."""

from __future__ import annotations

import json
from dataclasses import replace

import httpx
import openai
import pytest

from serve_app.core.errors import EngineError, OverloadedError
from serve_app.core.events import EngineCapabilities

PATH = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def events_of(response) -> list[dict]:
    events = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds_of(events: list[dict]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


@pytest.fixture
def calling(backend):
    """The backend's model writes Hermes' tool calls."""
    backend.cards = [replace(backend.cards[0], tool_syntax="hermes", max_model_len=4096)]
    backend.engine = EngineCapabilities(structured_output=True)
    return backend


async def test_whole_answer(client, backend):
    body = {
        "input": "hi",
        "instructions": "Be brief.",
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 9,
        "metadata": {"a": "b"},
        "user": "u",
    }
    answer = (await client.post(PATH, json=body)).json()
    assert (answer["object"], answer["status"], answer["model"]) == (
        "response",
        "completed",
        "org/tiny",
    )
    (item,) = answer["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    part = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    assert item["content"] == [part]
    assert answer["usage"]["output_tokens"] == 2
    assert answer["usage"]["total_tokens"] == answer["usage"]["input_tokens"] + 2
    for name in ("instructions", "temperature", "top_p", "max_output_tokens", "metadata", "user"):
        assert answer[name] == body[name]
    assert (answer["store"], answer["error"], answer["incomplete_details"]) == (False, None, None)
    (prepared,) = backend.prepared
    assert prepared.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    )
    sampling = backend.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.9, 9)


async def test_items_become_turns(client, backend):
    backend.cards = [replace(backend.cards[0], max_model_len=4096)]
    items = [
        {"role": "developer", "content": "dev"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "q"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "two"}],
        },
        {"role": "assistant", "content": "first"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]
    assert (await client.post(PATH, json={"input": items})).status_code == 200
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": {}}},
    ]
    assert backend.prepared[0].messages == (
        {"role": "system", "content": "dev"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "content": "one", "tool_call_id": "c1"},
        {"role": "tool", "content": "two", "tool_call_id": "c2"},
        {"role": "assistant", "content": "first"},
        {"role": "assistant", "content": "no"},
    )


async def test_stream_of_text(client):
    response = await client.post(PATH, json={"input": "hi", "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response)
    assert kinds_of(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert (events[0]["response"]["status"], events[0]["response"]["output"]) == ("in_progress", [])
    assert [event["delta"] for event in events if "delta" in event] == ["Hel", "lo"]
    last = events[-1]["response"]
    assert last["output"] == [events[-2]["item"]]
    assert last["output"][0]["content"][0]["text"] == events[6]["text"] == "Hello"
    assert last["usage"]["output_tokens"] == 2
    assert len({event["item_id"] for event in events if "item_id" in event}) == 1


@pytest.mark.parametrize("streamed", [False, True])
async def test_answer_that_was_cut_is_incomplete(client, backend, fakes, streamed):
    backend.script = fakes["chunks"]("Hel", finish="length")
    response = await client.post(PATH, json={"input": "hi", "stream": streamed})
    answer = events_of(response)[-1]["response"] if streamed else response.json()
    assert answer["status"] == answer["output"][0]["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    if streamed:
        assert kinds_of(events_of(response))[-1] == "incomplete"


async def test_empty_answer_still_has_a_message(client, backend, fakes):
    backend.script = fakes["chunks"]()
    answer = (await client.post(PATH, json={"input": "hi"})).json()
    assert answer["output"][0]["content"][0]["text"] == ""


@pytest.mark.parametrize("streamed", [False, True])
async def test_reasoning_and_calls_are_items(make_client, calling, fakes, streamed):
    client = make_client(model={"reasoning": "deepseek_r1"})
    calling.script = fakes["chunks"]("<think>", "hm", "</think>", "Sure. ", CALL_TEXT, CALL_TEXT)
    body = {"input": "hi", "tools": [WEATHER], "stream": streamed}
    response = await client.post(PATH, json=body)
    events = events_of(response) if streamed else []
    answer = events[-1]["response"] if streamed else response.json()
    reasoning, message, *calls = answer["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert message["content"][0]["text"] == "Sure."
    assert [(call["type"], call["name"]) for call in calls] == [("function_call", "weather")] * 2
    assert all(json.loads(call["arguments"]) == {"city": "Oslo"} for call in calls)
    assert len({item["id"] for item in answer["output"]}) == 4
    assert calls[0]["call_id"] != calls[1]["call_id"]
    assert answer["tools"][0]["name"] == "weather"
    assert calling.prepared[0].form.tools[0]["name"] == "weather"
    if streamed:
        parts = [e["delta"] for e in events if e["type"].endswith("arguments.delta")]
        assert "".join(parts) == calls[0]["arguments"] + calls[1]["arguments"]
        done = [e["arguments"] for e in events if e["type"].endswith("arguments.done")]
        assert done == [call["arguments"] for call in calls]
        items = [e["item"] for e in events if e["type"] == "response.output_item.done"]
        assert items == answer["output"]
        assert "response.reasoning_text.done" in [event["type"] for event in events]


async def test_the_output_of_an_answer_fits_the_next_input(make_client, calling, fakes):
    client = make_client(model={"reasoning": "deepseek_r1"})
    calling.script = fakes["chunks"]("<think>hm</think>", "Sure. ", CALL_TEXT)
    body = {"input": [{"role": "user", "content": "hi"}], "tools": [WEATHER]}
    output = (await client.post(PATH, json=body)).json()["output"]
    result = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "cold"}
    body["input"] += [*output, result]
    assert (await client.post(PATH, json=body)).status_code == 200
    _, turn, told = calling.prepared[-1].messages
    assert (turn["content"], turn["reasoning_content"]) == ("Sure.", "hm")
    assert turn["tool_calls"][0]["id"] == told["tool_call_id"]


async def test_named_choice_and_schema_become_chats(client, calling):
    choice = {"type": "function", "name": "weather"}
    body = {"input": "hi", "tools": [WEATHER], "tool_choice": choice}
    answer = (await client.post(PATH, json=body)).json()
    assert answer["tool_choice"] == choice
    assert calling.prepared[-1].form.forced_tools == ("weather",)
    wish = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    answer = (await client.post(PATH, json={"input": "hi", "text": {"format": wish}})).json()
    assert answer["text"]["format"] == wish
    assert calling.prepared[-1].form.schema == {"type": "object"}


async def test_effort_reaches_the_template(client, backend):
    await client.post(PATH, json={"input": "hi", "reasoning": {"effort": "low"}})
    assert backend.prepared[0].template_kwargs["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": [{"type": "text"}]}]}, "input.0.content.0.text"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input.0.output"),
        ({"input": "x", "temperature": 9}, "temperature"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "max_output_tokens": 1000}, "max_output_tokens"),
        ({"input": "x" * 100}, "input"),
        ({"input": ""}, "input"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools.0.type"),
        (
            {"input": "x", "tools": [{**WEATHER, "parameters": {"type": "array"}}]},
            "tools.0.parameters",
        ),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"input": "x", "metadata": {"k" * 65: "v"}}, f"metadata.{'k' * 65}.[key]"),
        ({"input": "x", "reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ],
)
async def test_faults_are_named_as_they_were_sent(client, backend, body, param):
    response = await client.post(PATH, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    for name in ("messages", "max_completion_tokens", "response_format", "function.parameters"):
        assert name not in error["message"]
    assert backend.requests == []


@pytest.mark.parametrize("streamed", [False, True])
async def test_errors_before_the_first_token_have_their_status(client, backend, streamed):
    backend.script = [OverloadedError("full")]
    response = await client.post(PATH, json={"input": "hi", "stream": streamed})
    assert response.status_code == 503
    assert "retry-after" in response.headers


async def test_later_error_fails_the_response_and_keeps_its_text(client, backend, fakes):
    backend.script = [fakes["chunks"]("Hel")[0], EngineError("The card was lost.")]
    response = await client.post(PATH, json={"input": "hi", "stream": True})
    events = events_of(response)
    assert kinds_of(events)[-1] == "failed"
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    assert failed["error"]["message"].startswith("The card was lost.")
    assert failed["output"][0]["content"][0]["text"] == "Hel"
    assert "[DONE]" not in response.text


@pytest.fixture
def sync_client(make_app, run_server):
    url = run_server(make_app()) + "/v1"
    plain = httpx.Client(trust_env=False)
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, http_client=plain) as client:
        yield client


def test_openai_client_whole_and_stream(sync_client):
    answer = sync_client.responses.create(model="tiny", input="hi", metadata={"a": "b"})
    assert answer.output_text == "Hello"
    assert answer.usage.output_tokens == 2
    stream = sync_client.responses.create(model="tiny", input="hi", stream=True)
    events = list(stream)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "Hello"
    assert events[-1].response.output_text == "Hello"
    with sync_client.responses.stream(model="tiny", input="hi") as helper:
        for _ in helper:
            pass
        assert helper.get_final_response().output_text == "Hello"


def test_openai_client_tells_errors(sync_client, backend, fakes):
    with pytest.raises(openai.BadRequestError) as bad:
        sync_client.responses.create(model="tiny", input="hi", previous_response_id="resp-1")
    assert (bad.value.code, bad.value.param) == ("unsupported_parameter", "previous_response_id")
    backend.script = [fakes["chunks"]("Hel")[0], EngineError("lost")]
    stream = sync_client.responses.create(model="tiny", input="hi", stream=True)
    last = list(stream)[-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
