"""The openai package, as its README shows it, against a real socket."""

from __future__ import annotations

import httpx
import openai
import pytest

from serve_app.core.errors import EngineError
from serve_app.core.requests import GenerateChunk

MESSAGES = [{"role": "user", "content": "hello"}]


def open_client(url: str, max_retries: int = 0) -> openai.OpenAI:
    """As in the package's README, but deaf to the environment's proxies."""
    plain = httpx.Client(trust_env=False)
    return openai.OpenAI(base_url=url, api_key="unused", max_retries=max_retries, http_client=plain)


@pytest.fixture
def url(make_app, run_server) -> str:
    return run_server(make_app(max_body_bytes=2000)) + "/v1"


@pytest.fixture
def sync_client(url):
    with open_client(url) as client:
        yield client


def test_sync_whole(sync_client):
    answer = sync_client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello"
    assert answer.usage.total_tokens == 7
    assert answer._request_id


def test_sync_stream(sync_client):
    stream = sync_client.chat.completions.create(
        model="gpt-4o", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    received = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in received if c.choices)
    assert text == "Hello"
    assert received[-1].usage.completion_tokens == 2
    assert received[-2].choices[0].finish_reason == "stop"


def test_stream_helper_accumulates(sync_client):
    with sync_client.chat.completions.stream(model="gpt-4o", messages=MESSAGES) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "Hello"


async def test_async_whole_and_stream(url):
    async with openai.AsyncOpenAI(
        base_url=url,
        api_key="unused",
        max_retries=0,
        http_client=httpx.AsyncClient(trust_env=False),
    ) as client:
        answer = await client.chat.completions.create(model="tiny", messages=MESSAGES)
        assert answer.choices[0].message.content == "Hello"
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        assert text == "Hello"


def test_completions_and_models(sync_client):
    answer = sync_client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=3)
    assert [choice.text for choice in answer.choices] == ["Hello", "Hello"]
    assert sync_client.models.retrieve("org/tiny").id == "org/tiny"
    assert "tiny" in [model.id for model in sync_client.models.list()]


def test_errors_become_the_clients_own(sync_client, backend, fakes):
    with pytest.raises(openai.NotFoundError) as missing:
        sync_client.chat.completions.create(model="none", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        sync_client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    assert bad.value.param == "temperature"
    content = [{"role": "user", "content": "x" * 6000}]
    with pytest.raises(openai.APIStatusError) as large:
        sync_client.chat.completions.create(model="tiny", messages=content)
    assert large.value.status_code == 413
    backend.script = [fakes["chunks"]("Hel")[0], EngineError("lost")]
    stream = sync_client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="lost"):
        list(stream)


def test_client_retries_an_overloaded_server(url, backend, fakes):
    from serve_app.core.errors import OverloadedError

    backend.scripts = [[OverloadedError("full", retry_after_s=0.01)], fakes["chunks"]("ok")]
    with open_client(url, max_retries=1) as client:
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.choices[0].message.content == "ok"
    assert len(backend.requests) == 2


def test_stopping_to_read_closes_the_generator(sync_client, backend, fakes):
    from concurrent.futures import Future

    forever: Future[None] = Future()
    backend.script = [fakes["chunks"]("Hel")[0], forever]
    stream = sync_client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    assert next(iter(stream)).choices[0].delta.content == "Hel"
    stream.close()
    with pytest.raises(BaseException):  # noqa: B017, PT011 - cancelled once the generator is closed
        forever.result(timeout=5)
    assert forever.cancelled()


def test_chunked_body_over_the_limit_on_a_socket(url):
    def body():
        for _ in range(300):
            yield b"x" * 1000

    response = httpx.post(f"{url}/chat/completions", content=body(), trust_env=False)
    assert response.status_code == 413


def test_empty_text_chunks_do_not_disturb(sync_client, backend):
    backend.script = [
        GenerateChunk(num_prompt=5, num_generated=1),
        GenerateChunk(text="x", num_prompt=5, num_generated=2, finish_reason="length"),
    ]
    stream = sync_client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == "x"
