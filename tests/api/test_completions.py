from __future__ import annotations

import json
from typing import Any

import pytest

from serve_app.api.protocol.completions import Completion, GenerateAnswer, GenerateEvent
from serve_app.core.requests import GenerateChunk, LogprobItem

PATH = "/v1/completions"


def events(text: str) -> list[Any]:
    sent = [part.removeprefix("data: ") for part in text.removesuffix("\n\n").split("\n\n")]
    assert sent[-1] == "[DONE]"
    return [json.loads(part) for part in sent[:-1]]


def item(token: str, logprob: float, *top: tuple[str, float]) -> LogprobItem:
    return LogprobItem(
        token, logprob, tuple(token.encode()), tuple((t, p, tuple(t.encode())) for t, p in top)
    )


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("hi", [(104, 105)]),
        (["hi", "yo"], [(104, 105), (121, 111)]),
        ([1, 2, 3], [(1, 2, 3)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
async def test_each_form_of_prompt(client, backend, prompt, ids):
    answer = (await client.post(PATH, json={"prompt": prompt})).json()
    Completion.model_validate(answer)
    assert [request.prompt_token_ids for request in backend.requests] == ids
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(ids)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert answer["id"].startswith("cmpl-")
    assert backend.requests[0].sampling.max_tokens == 16


async def test_n_answers_for_each_prompt_in_order(client, backend, fakes):
    backend.scripts = [fakes["chunks"](text) for text in "abcd"]
    body = {"prompt": ["x", "y"], "n": 2, "best_of": 2, "seed": 5}
    answer = (await client.post(PATH, json=body)).json()
    assert [choice["text"] for choice in answer["choices"]] == list("abcd")
    assert [request.sampling.seed for request in backend.requests] == [5, 6, 5, 6]
    assert answer["usage"]["prompt_tokens"] == 2


async def test_stream_order(client, backend):
    body = {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
    sent = events((await client.post(PATH, json=body)).text)
    for event in sent:
        Completion.model_validate(event)
    assert [event["choices"] for event in sent] == [
        [{"index": 0, "text": "Hel", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "lo", "logprobs": None, "finish_reason": None}],
        [
            {
                "index": 0,
                "text": "",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        [],
    ]
    assert [event["usage"] is None for event in sent] == [True, True, True, False]


@pytest.mark.parametrize("streamed", [False, True])
async def test_echo_with_logprobs(client, backend, streamed):
    prompt_items = (None, item("b", -1.0, ("b", -1.0), ("z", -2.0)))
    backend.script = [
        GenerateChunk(
            text="c",
            logprobs=(item("c", -0.5, ("d", -0.25)),),
            prompt_logprobs=prompt_items,
            num_prompt=2,
            num_generated=1,
        ),
        GenerateChunk(finish_reason="length", num_prompt=2, num_generated=1),
    ]
    body = {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 1, "stream": streamed}
    response = await client.post(PATH, json=body)
    choice = (events(response.text)[0] if streamed else response.json())["choices"][0]
    assert choice["text"] == "abc"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -1.0, -0.5],
        "top_logprobs": [None, {"b": -1.0, "z": -2.0}, {"d": -0.25, "c": -0.5}],
        "text_offset": [0, 1, 2],
    }
    assert backend.requests[0].sampling.prompt_logprobs == 1


async def test_echo_without_generation_needs_no_engine(client, backend):
    body = {"prompt": [104, 105], "echo": True, "max_tokens": 0}
    answer = (await client.post(PATH, json=body)).json()
    assert answer["choices"][0]["text"] == "hi"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 2
    assert backend.requests == []


async def test_scoring_only(client, backend):
    backend.script = [
        GenerateChunk(prompt_logprobs=(None, item("i", -1.5)), finish_reason="length", num_prompt=2)
    ]
    body = {"prompt": "hi", "echo": True, "max_tokens": 0, "logprobs": 0}
    choice = (await client.post(PATH, json=body)).json()["choices"][0]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.5]
    assert choice["logprobs"]["top_logprobs"] is None
    assert backend.requests[0].sampling.max_tokens == 0


async def test_offsets_go_on_through_a_stream(client, backend):
    backend.script = [
        GenerateChunk(text="ab", logprobs=(item("ab", -1.0),), num_prompt=1, num_generated=1),
        GenerateChunk(text="c", logprobs=(item("c", -1.0),), num_prompt=1, num_generated=2),
        GenerateChunk(finish_reason="stop", num_prompt=1, num_generated=2),
    ]
    sent = events(
        (await client.post(PATH, json={"prompt": "x", "logprobs": 0, "stream": True})).text
    )
    offsets = [e["choices"][0]["logprobs"]["text_offset"] for e in sent[:2]]
    assert offsets == [[0], [2]]


async def test_special_tokens_of_a_prompt_are_text(client, backend):
    await client.post(PATH, json={"prompt": "<|im_start|>", "add_special_tokens": False})
    assert not backend.prepared[0].parse_special
    assert not backend.prepared[0].add_special_tokens


async def test_generate_whole(client, backend):
    answer = (await client.post("/generate", json={"prompt": "x", "max_tokens": 4})).json()
    GenerateAnswer.model_validate(answer)
    assert answer["text"] == "Hello"
    assert answer["usage"]["completion_tokens"] == 2
    assert backend.requests[0].sampling.max_tokens == 4


async def test_generate_stream(client):
    response = await client.post("/generate", json={"prompt": "x", "stream": True})
    sent = events(response.text)
    for event in sent:
        GenerateEvent.model_validate(event)
    assert [event["text"] for event in sent] == ["Hel", "lo", ""]
    assert sent[-1]["finish_reason"] == "stop"
    assert sent[-1]["usage"]["total_tokens"] == 3


async def test_generate_from_the_query(client, backend):
    response = await client.post(
        "/generate", params={"prompt": "5", "max_tokens": "3", "temperature": "0"}
    )
    assert response.json()["text"] == "Hello"
    assert backend.prepared[0].text == "5"
    assert backend.requests[0].sampling.is_greedy


async def test_tokenize_and_detokenize(client, backend):
    text = (await client.post("/tokenize", json={"prompt": "hi", "return_token_strs": True})).json()
    assert text == {
        "count": 2,
        "max_model_len": 64,
        "tokens": [104, 105],
        "token_strs": ["h", "i"],
    }
    await client.post("/tokenize", json={"prompt": "<s>", "parse_special": True})
    assert backend.prepared[1].parse_special
    messages = [{"role": "user", "content": "hi"}]
    chat = (await client.post("/tokenize", json={"messages": messages})).json()
    assert chat["tokens"] == [104, 105]
    assert chat["token_strs"] is None
    assert not backend.prepared[2].add_special_tokens
    back = await client.post("/detokenize", json={"tokens": [104, 105]})
    assert back.json() == {"prompt": "hi"}


async def test_tokenizer_info_only_where_exposed(make_client):
    assert (await make_client().get("/tokenizer_info")).status_code == 404
    shown = await make_client(expose_tokenizer_info=True).get("/tokenizer_info")
    assert shown.json()["vocab_size"] == 300
