"""What happens around a stream: silence, clients that leave, deadlines, slow readers, framing."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.api.sse import DONE, event, json_string

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
STREAM = {**HELLO, "stream": True}


async def finished(task: asyncio.Task[None]) -> None:
    await asyncio.wait_for(task, 5)


async def test_silence_is_filled_with_comments(make_app, backend, fakes):
    release = asyncio.Event()
    made = fakes["chunks"]("Hel", "lo")
    backend.script = [made[0], release, *made[1:]]
    exchange = fakes["Exchange"](make_app(keep_alive_interval_s=0.01), CHAT, STREAM)
    task = asyncio.create_task(exchange.run())
    await exchange.wait_for(b": keep-alive\n\n: keep-alive\n\n")
    assert b'"lo"' not in exchange.text
    release.set()
    await finished(task)
    assert exchange.text.endswith(DONE)
    assert exchange.text.startswith(b"data: ")
    assert exchange.sent[-1].get("more_body", False) is False


async def test_nothing_is_sent_before_the_first_token(make_app, backend, fakes):
    release = asyncio.Event()
    backend.script = [release, *fakes["chunks"]("Hel")]
    exchange = fakes["Exchange"](make_app(keep_alive_interval_s=0.005), CHAT, STREAM)
    task = asyncio.create_task(exchange.run())
    await backend.started.wait()
    assert exchange.sent == []
    release.set()
    await finished(task)
    assert exchange.sent[0]["status"] == 200


@pytest.mark.parametrize("body", [STREAM, HELLO, {**STREAM, "n": 3}, {**HELLO, "n": 3}])
async def test_client_that_leaves_closes_every_generator(make_app, backend, fakes, body):
    backend.script = [fakes["chunks"]("Hel")[0], asyncio.Event()]
    app = make_app()
    exchange = fakes["Exchange"](app, CHAT, body)
    task = asyncio.create_task(exchange.run())
    await backend.started.wait()
    if body.get("stream"):
        await exchange.wait_for(b"Hel")
    exchange.disconnect()
    await finished(task)
    assert len(backend.closed) == len(backend.requests) == body.get("n", 1)
    assert b"[DONE]" not in exchange.text
    assert app.state.context.admission.num_in_flight == 0
    assert 'status="499"' in app.state.context.metrics.render()


async def test_client_that_leaves_before_the_first_token(make_app, backend, fakes):
    backend.script = [asyncio.Event()]
    exchange = fakes["Exchange"](make_app(), CHAT, STREAM)
    exchange.disconnect()
    await asyncio.wait_for(exchange.run(), 5)
    assert backend.closed == [request.request_id for request in backend.requests]
    assert exchange.sent == []


async def test_client_that_leaves_while_sending_its_body_is_no_error(make_app, fakes, caplog):
    app = make_app()
    exchange = fakes["Exchange"](app, CHAT, HELLO)
    exchange.inbox.get_nowait()
    exchange.inbox.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
    exchange.disconnect()
    await asyncio.wait_for(exchange.run(), 5)
    assert exchange.sent == []
    assert 'status="499"' in app.state.context.metrics.render()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("body", [STREAM, HELLO])
async def test_cancelled_request_closes_its_generator(make_app, backend, fakes, body):
    backend.script = [fakes["chunks"]("Hel")[0], asyncio.Event()]
    exchange = fakes["Exchange"](make_app(), CHAT, body)
    task = asyncio.create_task(exchange.run())
    await backend.started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(backend.closed) == 1


async def test_broken_pipe_counts_as_a_client_that_left(make_app, backend, fakes):
    backend.script = [*fakes["chunks"]("Hel", "lo")[:2], asyncio.Event()]
    exchange = fakes["Exchange"](make_app(), CHAT, STREAM)

    async def send(message):
        if message["type"] == "http.response.body":
            raise OSError("broken pipe")

    exchange.send = send
    await asyncio.wait_for(exchange.run(), 5)
    assert len(backend.closed) == 1


async def test_deadline_before_the_first_token_is_504(make_client, backend):
    backend.script = [asyncio.Event()]
    for body in (HELLO, STREAM):
        response = await make_client(request_timeout_s=0.02).post(CHAT, json=body)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
    assert len(backend.closed) == 2
    assert 0 < backend.requests[0].deadline_s <= 0.02


async def test_deadline_in_a_stream_is_an_event(make_client, backend, fakes):
    backend.script = [fakes["chunks"]("Hel")[0], asyncio.Event()]
    response = await make_client(request_timeout_s=0.05).post(CHAT, json=STREAM)
    assert response.status_code == 200
    *_, error, done = response.text.removesuffix("\n\n").split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert done == "data: [DONE]"
    assert len(backend.closed) == 1


async def test_deadline_holds_for_the_preparation(make_client, backend):
    backend.prepare_delay = asyncio.Event()
    response = await make_client(request_timeout_s=0.02).post(CHAT, json=HELLO)
    assert response.status_code == 504


async def test_chunks_that_gathered_go_out_in_one_write(make_app, backend, fakes):
    made = fakes["chunks"](*"abcdef")
    backend.script = [made[0], *made[1:]]
    exchange = fakes["Exchange"](make_app(), CHAT, STREAM)
    is_open = asyncio.Event()
    send = exchange.send

    async def slow_send(message):
        await send(message)
        if b'"content":"a"' in message.get("body", b""):
            await is_open.wait()

    exchange.send = slow_send
    task = asyncio.create_task(exchange.run())
    await exchange.wait_for(b'"content":"a"')
    await backend.all_closed.wait()  # a slow reader never holds the backend up
    is_open.set()
    await finished(task)
    bodies = [message["body"] for message in exchange.sent if message.get("body")]
    assert len(bodies) <= 3
    texts = [
        json.loads(part[6:])["choices"][0]["delta"].get("content", "")
        for part in exchange.text.decode().split("\n\n")
        if part.startswith("data: {")
    ]
    assert "".join(texts) == "abcdef"


async def test_many_streams_do_not_mix(make_client, backend, fakes):
    client = make_client()
    backend.scripts = [fakes["chunks"](*[f"{place}."] * 20) for place in range(50)]
    bodies = [{**STREAM, "user": str(place)} for place in range(50)]
    answers = await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))
    seen = set()
    for answer in answers:
        parts = answer.text.removesuffix("\n\n").split("\n\n")[:-2]
        texts = {json.loads(part[6:])["choices"][0]["delta"]["content"] for part in parts}
        assert len(texts) == 1
        assert len(parts) == 20
        seen |= texts
    assert len(seen) == 50


@given(st.text())
def test_any_text_is_one_json_string_on_one_line(text):
    data = json_string(text)
    back = json.loads(data)
    assert back == text.encode("utf-8", "replace").decode()
    assert len(data.decode().splitlines()) == 1


@given(st.lists(st.text(), max_size=6))
def test_framing_survives_any_text(texts):
    wire = b"".join(event({"text": text}) for text in texts) + DONE
    parts = wire.decode().split("\n\n")
    assert parts[-1] == ""
    assert parts[-2] == "data: [DONE]"
    back = [json.loads(part.removeprefix("data: "))["text"] for part in parts[:-2]]
    assert back == [text.encode("utf-8", "replace").decode() for text in texts]
    # Clients that cut at every kind of line break see the same events.
    lines = [line for line in wire.decode().splitlines() if line]
    assert len(lines) == len(texts) + 1
