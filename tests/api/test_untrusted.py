"""Bodies made to hurt: each is refused, cheaply, or answered; never a 5xx."""

from __future__ import annotations

import json
import time
import tracemalloc
from dataclasses import replace

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.api.protocol.bounds import MAX_ITEMS, check_size
from serve_app.core.errors import ClientError

CHAT, TEXT, ITEMS = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SIZE = 2**20
TURN = '{"role":"user","content":"x"}'
EMPTY, WORD = '""', '"w"'
MAX_COST = 40
"""Times the CPU of reading a list of the same size; collecting every fault took over 200."""
MAX_MEMORY = 40
"""Times the body; collecting every fault took over 400."""


def chat(extra: str, messages: str = TURN) -> tuple[str, str]:
    return CHAT, f'{{"messages":[{messages}],{extra}}}'


def listed(entry: str) -> str:
    return ",".join([entry] * (SIZE // (len(entry) + 1)))


def keys(value: str, num: int = 150_000) -> str:
    return ",".join(f'"{key}":{value}' for key in range(num))


LONG = "x" * SIZE
DEEP = "[" * (SIZE // 2) + "]" * (SIZE // 2)
ATTACKS = {
    "only brackets": (CHAT, "[" * SIZE),
    "closed brackets": (CHAT, DEEP),
    "only braces": (CHAT, '{"a":' * (SIZE // 5)),
    "deep template variables": chat(f'"chat_template_kwargs":{{"a":{DEEP}}}'),
    "deep unknown parameter": chat(f'"zzz":{DEEP}'),
    "deep schema": chat(f'"tools":[{{"type":"function","function":{{"name":"f","x":{DEEP}}}}}]'),
    "huge integer": chat(f'"max_tokens":{"9" * SIZE}'),
    "huge unknown integer": chat(f'"zzz":{"9" * SIZE}'),
    "integer of 4000 digits": chat(f'"seed":{"9" * 4000}'),
    "huge n": chat('"n":999999999999'),
    "huge float": chat(f'"temperature":{"9" * SIZE}.5'),
    "huge exponent": chat('"temperature":1e999999999'),
    "not a number": chat('"temperature":NaN'),
    "infinity": chat('"top_p":-Infinity'),
    "lone surrogate": chat('"user":"\\ud800"'),
    "lone surrogate in text": (CHAT, '{"messages":[{"role":"user","content":"\\ud800"}]}'),
    "raw NUL": (CHAT, "\x00" * SIZE),
    "stop strings": chat(f'"stop":[{",".join([WORD] * 100_000)}]'),
    "stop integers": chat(f'"stop":[{listed("1")}]'),
    "empty stop strings": chat(f'"stop":[{listed(EMPTY)}]'),
    "long stop string": chat(f'"stop":"{LONG}"'),
    "stop ids": chat(f'"stop_token_ids":[{listed("1")}]'),
    "logit_bias": chat(f'"logit_bias":{{{keys("1", 300_000)}}}'),
    "wrong logit_bias": chat(f'"logit_bias":{{{keys("{}", 60_000)}}}'),
    "logit_bias out of range": chat(f'"logit_bias":{{{keys("999", 100_000)}}}'),
    "long model": chat(f'"model":"{LONG}"'),
    "long user": chat(f'"user":"{LONG}"'),
    "long metadata": chat(f'"metadata":{{"a":"{LONG}"}}'),
    "much metadata": chat(f'"metadata":{{{keys(WORD, 100_000)}}}'),
    "unknown parameters": chat(keys("1", 100_000)),
    "unknown keys of a turn": (CHAT, f'{{"messages":[{{"role":"user",{keys("1", 100_000)}}}]}}'),
    "wrong turns": (CHAT, f'{{"messages":[{listed("1")}]}}'),
    "empty turns": (CHAT, f'{{"messages":[{listed("{}")}]}}'),
    "turns": (CHAT, f'{{"messages":[{listed(TURN)}]}}'),
    "wrong parts": (CHAT, f'{{"messages":[{{"role":"user","content":[{listed("1")}]}}]}}'),
    "wrong calls": (CHAT, f'{{"messages":[{{"role":"assistant","tool_calls":[{listed("1")}]}}]}}'),
    "wrong tools": chat(f'"tools":[{listed("1")}]'),
    "wrong ids": (TEXT, f'{{"prompt":[1,{listed("null")}]}}'),
    "negative ids": (TEXT, f'{{"prompt":[{listed("-1")}]}}'),
    "lists of ids": (TEXT, f'{{"prompt":[{listed("[1]")}]}}'),
    "prompts": (TEXT, f'{{"prompt":[{listed(WORD)}]}}'),
    "plain stop": ("/generate", f'{{"prompt":"x","stop":[{listed("1")}]}}'),
    "wrong items": (ITEMS, f'{{"input":[{listed("1")}]}}'),
    "empty items": (ITEMS, f'{{"input":[{listed("{}")}]}}'),
    "wrong item parts": (ITEMS, f'{{"input":[{{"role":"user","content":[{listed("1")}]}}]}}'),
    "wrong turns to tokenize": ("/tokenize", f'{{"messages":[{listed("1")}]}}'),
    "wrong ids to detokenize": ("/detokenize", f'{{"tokens":[{listed(EMPTY)}]}}'),
}


@pytest.fixture(scope="module")
def unit_s() -> float:
    """CPU seconds that reading a list of the attacks' size takes here."""
    body = f"[{listed('1')}]"
    started_s = time.process_time()
    json.loads(body)
    return time.process_time() - started_s


@pytest.mark.parametrize("name", ATTACKS)
async def test_attacks_are_refused_cheaply(client, backend, unit_s, name):
    path, body = ATTACKS[name]
    content = body.encode()
    started_s = time.process_time()
    response = await client.post(path, content=content)
    cost_s = time.process_time() - started_s
    assert 400 <= response.status_code < 500
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert len(response.content) < 2000
    assert backend.requests == []
    assert cost_s < MAX_COST * unit_s


@pytest.mark.parametrize("name", ["stop integers", "wrong turns", "wrong item parts", "turns"])
async def test_memory_stays_within_a_few_times_the_body(client, name):
    path, body = ATTACKS[name]
    content = body.encode()
    await client.post(path, content=b"{}")
    tracemalloc.start()
    try:
        await client.post(path, content=content)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < MAX_MEMORY * len(content)


@pytest.mark.parametrize("raw", [b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"])
async def test_what_is_no_utf8_is_refused(client, raw):
    body = b'{"messages":[{"role":"user","content":"' + raw + b'"}]}'
    assert (await client.post(CHAT, content=body)).status_code == 400


@pytest.mark.parametrize("text", ["a\x00b", "\U0010ffff", "\u202e\u2028", "{[,:" * 50_000])
@pytest.mark.parametrize("path", [CHAT, ITEMS])
async def test_odd_text_is_text(client, backend, text, path):
    backend.cards = [replace(backend.cards[0], max_model_len=2**20)]
    body = {"messages": [{"role": "user", "content": text}], "input": text}
    del body["input" if path == CHAT else "messages"]
    assert (await client.post(path, json=body)).status_code == 200
    assert backend.prepared[0].messages[0]["content"] == text


async def test_bounds_are_above_what_is_used(client, backend):
    backend.cards = [replace(backend.cards[0], max_model_len=2**20)]
    body = {
        "messages": [json.loads(TURN)] * MAX_ITEMS,
        "metadata": {str(k): "v" for k in range(16)},
    }
    assert (await client.post(CHAT, json=body)).status_code == 200
    body["messages"].append(json.loads(TURN))
    assert (await client.post(CHAT, json=body)).json()["error"]["param"] == "messages"


def test_values_are_counted():
    check_size(b"[%b1]" % (b"1," * 2**20))
    with pytest.raises(ClientError, match="values"):
        check_size(b"[%b1]" % (b"1," * (2**20 + 1)))


@settings(max_examples=20, deadline=None)
@given(
    text=st.text('"\\{[,: a', max_size=40),
    num=st.integers(0, 3),
)
def test_only_marks_outside_of_strings_count(text: str, num: int):
    held = json.dumps([text, {"k": text}] + [{}] * num)
    check_size(held.encode())
    many = json.dumps([text] + [{}] * (2**16 + 1))
    if num == 0:
        with pytest.raises(ClientError, match="objects"):
            check_size(many.encode())
    crowded = json.dumps([text, "{" * (2**16 + 1), text])
    check_size(crowded.encode())


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
_NAMES = ["messages", "prompt", "input", "stop", "logit_bias", "tools", "tool_choice", "metadata"]
_NAMES += ["response_format", "text", "reasoning", "seed", "n", "max_tokens", "stream", "include"]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from([CHAT, TEXT, ITEMS, "/generate", "/tokenize", "/detokenize"]),
    body=st.dictionaries(st.sampled_from(_NAMES), _JSON, max_size=5),
)
async def test_any_json_is_answered(make_app, path, body):
    transport = httpx.ASGITransport(app=make_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        if path != "/detokenize":
            start = {"messages": [json.loads(TURN)], "prompt": "x", "input": "x"}
            body = {**start, **body}
        response = await client.post(path, content=json.dumps(body).encode())
    assert response.status_code < 500, response.text
