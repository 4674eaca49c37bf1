from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

CAPITAL: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "What is the capital of France?"}
]


def test_not_streamed(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=CAPITAL, temperature=0, max_tokens=32
    )

    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_is_the_same_text(client: openai.OpenAI, model: str) -> None:
    request: dict[str, Any] = {
        "model": model,
        "messages": CAPITAL,
        "temperature": 0,
        "max_tokens": 32,
    }
    whole = client.chat.completions.create(**request).choices[0].message.content
    chunks = list(
        client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        )
    )

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


async def test_the_asynchronous_client(service: Any, model: str) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{service.url}/v1", api_key="unused", max_retries=0
    ) as client:
        answer = await client.chat.completions.create(
            model=model, messages=CAPITAL, temperature=0, max_tokens=32
        )
        stream = await client.chat.completions.create(
            model=model, messages=CAPITAL, temperature=0, max_tokens=32, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]

    assert "Paris" in (answer.choices[0].message.content or "")
    assert "".join(pieces) == answer.choices[0].message.content


def test_completions(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt="The capital of France is", temperature=0, max_tokens=8
    )

    assert "Paris" in answer.choices[0].text


def test_models(client: openai.OpenAI, model: str) -> None:
    listed = client.models.list().data

    assert model in [entry.id for entry in listed]
    assert client.models.retrieve(model).id == model


def test_the_local_config_takes_any_model_name(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="gpt-4o", messages=CAPITAL, temperature=0, max_tokens=4
    )

    assert answer.choices[0].message.content


def test_a_second_turn_remembers_the_first(client: openai.OpenAI, model: str) -> None:
    messages: list[ChatCompletionMessageParam] = [
        *CAPITAL,
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "Repeat the name of that city."},
    ]
    answer = client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=32
    )

    assert "Paris" in (answer.choices[0].message.content or "")


def test_a_seed_gives_the_same_text(client: openai.OpenAI, model: str) -> None:
    texts = {
        client.chat.completions.create(
            model=model, messages=CAPITAL, temperature=1.5, seed=7, max_tokens=24
        )
        .choices[0]
        .message.content
        for _ in range(3)
    }

    assert len(texts) == 1


@pytest.mark.parametrize(
    ("changes", "error", "code"),
    [
        ({"temperature": -1}, openai.BadRequestError, "invalid_value"),
        ({"max_tokens": 0}, openai.BadRequestError, "invalid_value"),
        ({"messages": []}, openai.BadRequestError, "invalid_value"),
        (
            {"messages": [{"role": "user", "content": "word " * 20_000}]},
            openai.BadRequestError,
            "context_length_exceeded",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            openai.BadRequestError,
            "unsupported_parameter",
        ),
    ],
    ids=["temperature", "max_tokens", "messages", "context", "tools"],
)
def test_errors_as_the_client_sees_them(
    client: openai.OpenAI,
    model: str,
    changes: dict[str, Any],
    error: type[openai.APIStatusError],
    code: str,
) -> None:
    request: dict[str, Any] = {"model": model, "messages": CAPITAL, "max_tokens": 4} | changes

    with pytest.raises(error) as raised:
        client.chat.completions.create(**request)

    assert raised.value.code == code
