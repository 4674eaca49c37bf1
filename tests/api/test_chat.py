from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import httpx
import pytest

from serve_app.api.app import create_app
from serve_app.api.protocol.chat import ChatCompletion, ChatCompletionChunk
from serve_app.config.schema import AppConfig
from serve_app.core.events import EngineCapabilities
from serve_app.core.requests import GenerateChunk, LogprobItem

HELLO = {"model": "org/tiny", "messages": [{"role": "user", "content": "hello"}]}
PATH = "/v1/chat/completions"


def events(text: str) -> list[Any]:
    assert text.endswith("\n\n")
    lines = text[:-2].split("\n\n")
    return [line if line.startswith(":") else line.removeprefix("data: ") for line in lines]


async def test_whole_answer_has_exactly_the_documented_shape(client, backend, fakes):
    backend.script = fakes["chunks"]("Hel", "lo", num_cached=3)
    answer = (await client.post(PATH, json=HELLO)).json()
    ChatCompletion.model_validate(answer)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "org/tiny"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


async def test_stream_byte_for_byte(client, backend):
    body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
    response = await client.post(PATH, json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    first = json.loads(events(response.text)[0])
    common = (
        f'"id":"{first["id"]}","object":"chat.completion.chunk","created":{first["created"]},'
        f'"model":"org/tiny","system_fingerprint":"{first["system_fingerprint"]}"'
    )
    choice = '"choices":[{"index":0,"delta":'
    plain = '"logprobs":null,"finish_reason":null}],"usage":null}'
    assert events(response.text) == [
        f'{{{common},{choice}{{"role":"assistant","content":"Hel"}},{plain}',
        f'{{{common},{choice}{{"content":"lo"}},{plain}',
        f'{{{common},{choice}{{}},"logprobs":null,"finish_reason":"stop","stop_reason":null}}]'
        ',"usage":null}',
        f'{{{common},"choices":[],"usage":{{"prompt_tokens":5,"completion_tokens":2,'
        '"total_tokens":7,"prompt_tokens_details":{"cached_tokens":0},'
        '"completion_tokens_details":{"reasoning_tokens":0}}}',
        "[DONE]",
    ]
    for event in events(response.text)[:-1]:
        ChatCompletionChunk.model_validate_json(event)


async def test_text_and_finish_reason_never_share_a_chunk(client, backend):
    backend.script = [
        GenerateChunk(text="all", num_prompt=5, num_generated=1, finish_reason="length")
    ]
    response = await client.post(PATH, json={**HELLO, "stream": True})
    sent = [json.loads(event) for event in events(response.text)[:-1]]
    assert [choice["choices"][0]["delta"] for choice in sent] == [
        {"role": "assistant", "content": "all"},
        {},
    ]
    assert [choice["choices"][0]["finish_reason"] for choice in sent] == [None, "length"]
    assert "usage" not in sent[0]


async def test_empty_answer_still_has_a_role_chunk(client, backend):
    backend.script = [GenerateChunk(num_prompt=5, num_generated=1, finish_reason="stop")]
    response = await client.post(PATH, json={**HELLO, "stream": True})
    first = json.loads(events(response.text)[0])
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["choices"][0]["finish_reason"] is None


async def test_held_back_text_sends_nothing(client, backend, fakes):
    backend.script = fakes["chunks"]("a", "", "b")
    response = await client.post(PATH, json={**HELLO, "stream": True})
    assert len(events(response.text)) == 4  # a with the role, b, finish, [DONE]


@pytest.mark.parametrize("streamed", [False, True])
async def test_stop_reason_is_reported(client, backend, fakes, streamed):
    backend.script = fakes["chunks"]("a", stop_reason="END")
    response = await client.post(PATH, json={**HELLO, "stop": "END", "stream": streamed})
    body = json.loads(events(response.text)[-2]) if streamed else response.json()
    assert body["choices"][0]["stop_reason"] == "END"
    assert backend.requests[0].stop == ("END",)


async def test_n_choices_have_derived_seeds_and_their_own_text(client, backend, fakes):
    backend.scripts = [fakes["chunks"](text) for text in ("one", "two", "three")]
    answer = (await client.post(PATH, json={**HELLO, "n": 3, "seed": 2**63 - 2})).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["one", "two", "three"]
    assert [request.sampling.seed for request in backend.requests] == [
        2**63 - 2,
        2**63 - 1,
        -(2**63),
    ]
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == 3
    assert len({request.request_id for request in backend.requests}) == 3


async def test_n_choices_stream_each_in_order(client, backend, fakes):
    backend.scripts = [fakes["chunks"]("a", "b"), fakes["chunks"]("c", "d")]
    response = await client.post(PATH, json={**HELLO, "n": 2, "stream": True})
    assert events(response.text)[-1] == "[DONE]"
    seen: dict[int, list[Any]] = {0: [], 1: []}
    for event in events(response.text)[:-1]:
        choice = json.loads(event)["choices"][0]
        seen[choice["index"]].append(choice["finish_reason"] or choice["delta"])
    assert seen == {
        0: [{"role": "assistant", "content": "a"}, {"content": "b"}, "stop"],
        1: [{"role": "assistant", "content": "c"}, {"content": "d"}, "stop"],
    }


async def test_reasoning_goes_to_its_own_field(make_client, backend, fakes):
    backend.starts_in_reasoning = True
    backend.script = fakes["chunks"]("I think", "</think>", "Paris")
    client = make_client()
    message = (await client.post(PATH, json=HELLO)).json()["choices"][0]["message"]
    assert message == {
        "role": "assistant",
        "content": "Paris",
        "refusal": None,
        "reasoning_content": "I think",
    }


async def test_reasoning_streams_first_and_is_counted(make_client, backend, fakes):
    backend.starts_in_reasoning = True
    backend.script = fakes["chunks"]("I ", "think", "</think>", "Paris")
    client = make_client(reasoning_field="reasoning")
    body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
    sent = [json.loads(event) for event in events((await client.post(PATH, json=body)).text)[:-1]]
    deltas = [chunk["choices"][0]["delta"] for chunk in sent[:-1]]
    assert deltas == [
        {"role": "assistant", "content": "", "reasoning": "I "},
        {"reasoning": "think"},
        {"content": "Paris"},
        {},
    ]
    assert sent[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


async def test_logprobs_in_the_chat_form(client, backend, fakes):
    item = LogprobItem(
        "Hé", -0.5, (72, 233), (("Hé", -0.5, (72, 233)), ("x", -float("inf"), (120,)))
    )
    chunk = GenerateChunk(text="Hé", logprobs=(item,), num_prompt=5, num_generated=1)
    backend.script = [chunk, GenerateChunk(finish_reason="stop", num_prompt=5, num_generated=1)]
    body = {**HELLO, "logprobs": True, "top_logprobs": 2}
    expected = [
        {
            "token": "Hé",
            "logprob": -0.5,
            "bytes": [72, 233],
            "top_logprobs": [
                {"token": "Hé", "logprob": -0.5, "bytes": [72, 233]},
                {"token": "x", "logprob": -9999.0, "bytes": [120]},
            ],
        }
    ]
    answer = (await client.post(PATH, json=body)).json()
    assert answer["choices"][0]["logprobs"] == {"content": expected, "refusal": None}
    assert backend.requests[0].sampling.logprobs == 2
    streamed = await client.post(PATH, json={**body, "stream": True})
    first = json.loads(events(streamed.text)[0])
    assert first["choices"][0]["logprobs"]["content"] == expected


async def test_sampling_takes_request_then_model_then_openai_defaults(client, backend, fakes):
    card = fakes["CARD"]
    defaults = {"temperature": 0.2, "top_k": 40, "repetition_penalty": 1.1}
    backend.cards = [
        type(card)(
            **{
                **{name: getattr(card, name) for name in card.__dataclass_fields__},
                "default_sampling": defaults,
            }
        )
    ]
    await client.post(PATH, json={**HELLO, "temperature": 0.7, "top_p": 0})
    sampling = backend.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.repetition_penalty) == (0.7, 40, 1.1)
    assert 0 < sampling.top_p < 0.001
    assert sampling.presence_penalty == 0
    assert sampling.max_tokens == 64 - 5
    assert sampling.stop_token_ids == (299,)


async def test_model_default_that_the_engine_lacks_is_left_out(client, backend, fakes):
    card = fakes["CARD"]
    backend.cards = [
        type(card)("org/tiny", (), 64, 300, 1, "tiny", (299,), {"repetition_penalty": 1.1})
    ]
    backend.engine = EngineCapabilities(penalties=False)
    assert (await client.post(PATH, json=HELLO)).status_code == 200
    assert backend.requests[0].sampling.repetition_penalty == 1.0


async def test_ignore_eos_drops_the_eos_ids(client, backend):
    await client.post(PATH, json={**HELLO, "ignore_eos": True, "stop_token_ids": [7, 7]})
    assert backend.requests[0].sampling.stop_token_ids == (7,)
    assert backend.requests[0].sampling.ignore_eos


async def test_max_completion_tokens_stands_over_max_tokens(client, backend):
    await client.post(PATH, json={**HELLO, "max_tokens": 3, "max_completion_tokens": 4})
    assert backend.requests[0].sampling.max_tokens == 4


async def test_configured_default_length(make_client, backend):
    await make_client(default_max_tokens=9).post(PATH, json=HELLO)
    assert backend.requests[0].sampling.max_tokens == 9


async def test_messages_reach_the_template_normalised(client, backend):
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "user", "content": "q", "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "hm",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    await client.post(PATH, json={**HELLO, "messages": messages, "reasoning_effort": "low"})
    prepared = backend.prepared[0]
    assert prepared.messages == (
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "q", "name": "ann"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
            ],
        },
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    )
    assert prepared.template_kwargs == {
        "reasoning_effort": "low",
        "enable_thinking": True,
        "thinking": True,
    }
    assert prepared.add_generation_prompt
    assert not prepared.parse_special


async def test_continue_final_message(client, backend):
    await client.post(PATH, json={**HELLO, "continue_final_message": True})
    assert backend.prepared[0].continue_final_message
    assert not backend.prepared[0].add_generation_prompt


async def test_chat_template_of_a_request_only_where_allowed(make_client, backend):
    body = {**HELLO, "chat_template": "{{ messages }}"}
    refused = await make_client().post(PATH, json=body)
    assert refused.json()["error"]["code"] == "unsupported_parameter"
    hidden = {**HELLO, "chat_template_kwargs": {"chat_template": "x"}}
    assert (await make_client().post(PATH, json=hidden)).status_code == 400
    allowed = await make_client(allow_request_chat_template=True).post(PATH, json=body)
    assert allowed.status_code == 200
    assert backend.prepared[0].template_kwargs["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("name", ["tiny", "gpt-4o", "org/tiny", None])
async def test_aliases_and_no_name_reach_the_model(client: httpx.AsyncClient, name):
    body = {**HELLO, "model": name}
    assert (await client.post(PATH, json=body)).json()["model"] == "org/tiny"


async def test_fingerprint_tells_batch_invariance(client, backend):
    plain = (await client.post(PATH, json=HELLO)).json()["system_fingerprint"]
    backend.engine = EngineCapabilities(batch_invariant=True)
    assert (await client.post(PATH, json=HELLO)).json()["system_fingerprint"] == plain + "-bi"


async def test_prompts_are_logged_only_where_configured(backend, make_client, caplog):
    with caplog.at_level(logging.DEBUG, logger="serve_app"):
        await make_client().post(PATH, json=HELLO)
    assert "hello" not in caplog.text
    app = create_app(backend, AppConfig.model_validate({"logging": {"log_prompts": True}}))
    with caplog.at_level(logging.DEBUG, logger="serve_app"):
        await make_client(app=app).post(PATH, json=HELLO)
    assert "hello" in caplog.text


@pytest.mark.parametrize(
    ("setting", "is_reasoning", "split"),
    [
        ("auto", False, False),
        ("auto", True, True),
        ("none", True, False),
        ("deepseek_r1", False, True),
    ],
)
async def test_reasoning_is_split_by_setting_and_model(
    make_client, backend, fakes, setting, is_reasoning, split
):
    backend.cards = [replace(fakes["CARD"], is_reasoning=is_reasoning)]
    backend.script = fakes["chunks"]("<think>", "hm", "</think>", "Paris")
    client = make_client(model={"reasoning": setting})
    message = (await client.post(PATH, json=HELLO)).json()["choices"][0]["message"]
    assert message["content"] == ("Paris" if split else "<think>hm</think>Paris")
    assert message.get("reasoning_content") == ("hm" if split else None)
