"""Tools, response formats and limits on thinking, as clients send and read them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import openai
import pytest

from serve_app.core.errors import ClientError
from serve_app.core.events import EngineCapabilities
from serve_app.core.requests import GenerateChunk
from serve_app.core.sampling import Constraint

PATH = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS},
}
OTHER = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "weather"}}
ABLE = EngineCapabilities(structured_output=True, thinking_budget=True)
CALL = (
    "Sure.\n",
    "<tool",
    '_call>\n{"name": "weather", ',
    '"arguments": {"ci',
    'ty": "Rome"}',
    "}",
)
CALLS = (*CALL, "\n</tool_call>\n", '<tool_call>{"name": "now", "arguments": {}}</tool_call>')


@pytest.fixture
def able(backend, fakes):
    """The backend with a model that writes tools and an engine that follows grammars."""
    backend.cards = [replace(fakes["CARD"], tool_syntax="hermes")]
    backend.engine = ABLE
    return backend


def sent_events(text: str) -> list[dict]:
    lines = [line[6:] for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def error_of(response) -> dict:
    assert response.status_code == 400
    return response.json()["error"]


async def test_calls_of_a_whole_answer(client, able, fakes):
    able.script = fakes["chunks"](*CALLS)
    body = {**HELLO, "tools": [TOOL, OTHER]}
    choice = (await client.post(PATH, json=body)).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "Sure."
    first, second = message["tool_calls"]
    assert first["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert second["function"] == {"name": "now", "arguments": "{}"}
    assert first["type"] == "function"
    assert first["id"] != second["id"]
    assert able.prepared[0].form.tools == (
        {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS},
        {
            "name": "now",
            "description": "",
            "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
        },
    )
    assert not able.prepared[0].form.needs_grammar
    assert able.requests[0].shown_special_tokens == ("<tool_call>", "</tool_call>")


async def test_content_is_null_where_there_are_calls_alone(client, able, fakes):
    able.script = fakes["chunks"](*CALLS[1:])
    body = {**HELLO, "tools": [TOOL, OTHER]}
    message = (await client.post(PATH, json=body)).json()["choices"][0]["message"]
    assert message["content"] is None


async def test_order_of_a_stream_with_calls(client, able, fakes):
    able.script = fakes["chunks"](*CALLS)
    body = {**HELLO, "tools": [TOOL, OTHER], "stream": True}
    choices = [e["choices"][0] for e in sent_events((await client.post(PATH, json=body)).text)]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "tool_calls")
    deltas = [choice["delta"] for choice in choices[:-1]]
    assert deltas[0] == {"role": "assistant", "content": "Sure."}
    pieces = [delta["tool_calls"][0] for delta in deltas[1:]]
    assert [list(delta) for delta in deltas[1:]] == [["tool_calls"]] * len(pieces)
    assert pieces[0] == {
        "index": 0,
        "id": pieces[0]["id"],
        "type": "function",
        "function": {"name": "weather", "arguments": ""},
    }
    assert pieces[1:3] == [
        {"index": 0, "function": {"arguments": '{"ci'}},
        {"index": 0, "function": {"arguments": 'ty": "Rome"}'}},
    ]
    assert [piece["index"] for piece in pieces] == [0, 0, 0, 1, 1]
    assert "tool_call>" not in json.dumps([delta.get("content") for delta in deltas])


async def test_an_engine_without_tools_refuses_them(client, able):
    able.engine = replace(ABLE, tools=False)
    error = error_of(await client.post(PATH, json={**HELLO, "tools": [TOOL]}))
    assert (error["code"], error["param"]) == ("unsupported_parameter", "tools")
    allowed = await client.post(PATH, json={**HELLO, "tools": [TOOL], "tool_choice": "none"})
    assert allowed.status_code == 200


@pytest.mark.parametrize("stream", [True, False])
async def test_a_length_that_cuts_a_json_answer_is_told_as_one(client, able, fakes, stream):
    able.script = fakes["chunks"]('{"a": ', "[1, ", finish="length")
    body = {**HELLO, "response_format": {"type": "json_object"}, "max_tokens": 2}
    response = await client.post(PATH, json={**body, "stream": stream})
    if stream:
        choices = [event["choices"][0] for event in sent_events(response.text)]
        assert "".join(choice["delta"].get("content") or "" for choice in choices) == '{"a": [1, '
        assert choices[-1]["finish_reason"] == "length"
        return
    choice = response.json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ('{"a": [1, ', "length")


async def test_a_length_that_cuts_a_call_stays_a_length(client, able, fakes):
    able.script = fakes["chunks"](*CALL[:4], finish="length")
    choice = (await client.post(PATH, json={**HELLO, "tools": [TOOL]})).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"ci'


async def test_a_broken_call_comes_back_as_content(client, able, fakes):
    able.script = fakes["chunks"]("<tool_call>", "weather(Rome)", "</tool_call>")
    choice = (await client.post(PATH, json={**HELLO, "tools": [TOOL]})).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"] == {"role": "assistant", "content": "weather(Rome)", "refusal": None}


async def test_reasoning_comes_before_calls_and_is_not_searched_for_them(client, able, fakes):
    able.cards = [replace(able.cards[0], is_reasoning=True)]
    able.starts_in_reasoning = True
    able.script = fakes["chunks"]("a <tool_call> might do", "</think>\n\n", *CALLS[1:])
    message = (await client.post(PATH, json={**HELLO, "tools": [TOOL]})).json()["choices"][0]
    assert message["message"]["reasoning_content"] == "a <tool_call> might do"
    assert len(message["message"]["tool_calls"]) == 2


@pytest.mark.parametrize(
    ("extra", "forced", "max_calls"),
    [
        ({}, (), None),
        ({"tool_choice": "auto", "parallel_tool_calls": True}, (), None),
        ({"parallel_tool_calls": False}, (), 1),
        ({"tool_choice": "required"}, ("weather", "now"), None),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ("weather", "now"), 1),
        ({"tool_choice": NAMED}, ("weather",), 1),
    ],
)
async def test_choices_become_a_form(client, able, extra, forced, max_calls):
    assert (await client.post(PATH, json={**HELLO, "tools": [TOOL, OTHER], **extra})).is_success
    form = able.prepared[0].form
    assert (form.forced_tools, form.max_calls) == (forced, max_calls)
    assert form.needs_grammar is bool(forced)


async def test_tool_choice_none_hides_the_tools(client, able, fakes):
    able.script = fakes["chunks"]("<tool_call>x")
    body = {**HELLO, "tools": [TOOL], "tool_choice": "none"}
    choice = (await client.post(PATH, json=body)).json()["choices"][0]
    assert able.prepared[0].form is None
    assert choice["message"]["content"] == "<tool_call>x"


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": 3}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "nope"}}},
            "tool_choice",
        ),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools.0.function.name",
        ),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
                ]
            },
            "tools.0.function.parameters",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"thinking_budget": -1}, "thinking_budget"),
    ],
)
async def test_faults_are_named(client, able, extra, param):
    error = error_of(await client.post(PATH, json={**HELLO, **extra}))
    assert (error["code"], error["param"]) == ("invalid_value", param)
    assert able.prepared == []


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": NAMED}, "tool_choice"),
        ({"thinking_budget": 10}, "thinking_budget"),
    ],
)
async def test_engines_without_grammars_refuse_by_name(client, able, extra, param):
    able.engine = EngineCapabilities()
    error = error_of(await client.post(PATH, json={**HELLO, **extra}))
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)


async def test_tools_without_force_need_nothing_of_the_engine(client, able, fakes):
    able.engine = EngineCapabilities()
    able.script = fakes["chunks"](*CALLS)
    choice = (await client.post(PATH, json={**HELLO, "tools": [TOOL]})).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


async def test_response_formats_become_schemas(client, able):
    wish = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    await client.post(PATH, json={**HELLO, "response_format": wish})
    await client.post(PATH, json={**HELLO, "response_format": {"type": "json_object"}})
    await client.post(PATH, json={**HELLO, "response_format": {"type": "text"}})
    forms = [prepared.form for prepared in able.prepared]
    assert [form and form.schema for form in forms] == [SCHEMA, {"type": "object"}, None]


async def test_the_grammar_reaches_every_sequence(client, able):
    able.grammar = "start: /a/\n"
    body = {**HELLO, "response_format": {"type": "json_object"}, "n": 2}
    await client.post(PATH, json=body)
    found = [request.sampling.constraint for request in able.requests]
    assert found == [Constraint("start: /a/\n")] * 2


async def test_what_the_preprocessor_refuses_is_a_400(client, able):
    fault = ClientError("response_format: this schema cannot be followed", param="response_format")
    able.prepare_error = fault.info()
    body = {**HELLO, "response_format": {"type": "json_object"}}
    error = error_of(await client.post(PATH, json=body))
    assert (error["code"], error["param"]) == ("invalid_value", "response_format")


@pytest.mark.parametrize(
    ("extra", "settings", "budget"),
    [
        ({"reasoning_effort": "none"}, {}, 0),
        ({"reasoning_effort": "low"}, {}, 1024),
        ({"reasoning_effort": "low"}, {"low": 300}, 300),
        ({"reasoning_effort": "high"}, {}, None),
        ({"reasoning_effort": "high", "thinking_budget": 7}, {}, 7),
        ({"thinking_budget": 700}, {"max_thinking_tokens": 50}, 50),
        ({}, {"max_thinking_tokens": 50}, 50),
        ({}, {}, None),
    ],
)
async def test_efforts_become_budgets(make_reasoning_client, able, extra, settings, budget):
    able.starts_in_reasoning = True
    client = make_reasoning_client(settings)
    assert (await client.post(PATH, json={**HELLO, **extra})).is_success
    constraint = able.requests[0].sampling.constraint
    if budget is None:
        assert constraint is None
    else:
        assert constraint == Constraint(is_thinking=True, thinking_budget=budget)
    assert able.requests[0].reasoning_kind == "deepseek_r1"
    assert able.requests[0].starts_in_reasoning


@pytest.fixture
def make_reasoning_client(make_client, backend):
    from serve_app.api.app import create_app
    from serve_app.config.schema import AppConfig

    def make(settings):
        sections = {"model": {"name": "org/tiny"}, "reasoning": settings}
        return make_client(app=create_app(backend, AppConfig.model_validate(sections)))

    return make


async def test_an_effort_is_a_wish_where_the_engine_cannot_end_thinking(client, able):
    able.engine = EngineCapabilities()
    able.starts_in_reasoning = True
    assert (await client.post(PATH, json={**HELLO, "reasoning_effort": "low"})).is_success
    assert able.requests[0].sampling.constraint is None


async def test_effort_none_asks_the_template_not_to_think(client, able):
    kwargs = {"thinking": "mine"}
    body = {**HELLO, "reasoning_effort": "none", "chat_template_kwargs": kwargs}
    await client.post(PATH, json=body)
    assert able.prepared[0].template_kwargs == {"enable_thinking": False, "thinking": "mine"}


async def test_reasoning_tokens_are_those_that_the_replica_counted(client, able):
    able.starts_in_reasoning = True
    able.script = [
        GenerateChunk(text="hm</think>ok", num_prompt=5, num_generated=9, num_reasoning=7),
        GenerateChunk(finish_reason="stop", num_prompt=5, num_generated=9, num_reasoning=7),
    ]
    usage = (await client.post(PATH, json=HELLO)).json()["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 7}


async def test_the_openai_client_reads_calls_and_formats(run_server, make_app, able, fakes):
    able.scripts = [fakes["chunks"](*CALLS), fakes["chunks"](*CALLS), fakes["chunks"]('{"a": 1}')]
    url = run_server(make_app())
    api = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    arguments = {"model": "tiny", "messages": HELLO["messages"]}
    async with api, asyncio.timeout(20):
        whole = await api.chat.completions.create(**arguments, tools=[TOOL, OTHER])
        stream = api.chat.completions.stream(**arguments, tools=[TOOL, OTHER])
        async with stream as events:
            kinds = [event.type async for event in events]
            streamed = await events.get_final_completion()
        formatted = await api.chat.completions.create(
            **arguments, response_format={"type": "json_object"}
        )
    for completion in (whole, streamed):
        choice = completion.choices[0]
        assert choice.finish_reason == "tool_calls"
        calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls]
        assert calls == [("weather", '{"city": "Rome"}'), ("now", "{}")]
    assert kinds.count("tool_calls.function.arguments.done") == 2
    assert json.loads(formatted.choices[0].message.content) == {"a": 1}


async def test_the_documents_name_the_parameters(client):
    document = (await client.get("/openapi.json")).json()
    properties = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"tools", "tool_choice", "response_format", "thinking_budget"} <= set(properties)
    assert "tool_calls" in document["components"]["schemas"]["ChatDelta"]["properties"]
