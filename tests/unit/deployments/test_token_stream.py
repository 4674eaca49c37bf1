import asyncio

from serve_app.core.events import FinishReason, TokenEvent
from serve_app.deployments.token_stream import paced
from serve_app.engine.token_stream import TokenStream


def token(number: int, reason: FinishReason | None = None) -> TokenEvent:
    return TokenEvent("r", (number,), finish_reason=reason)


async def collect(stream: TokenStream, interval_s: float) -> list[list[int]]:
    messages = []
    async for events in paced(stream, lambda: interval_s):
        messages.append([event.new_token_ids[0] for event in events])
    return messages


async def test_the_first_token_goes_at_once_and_the_rest_is_gathered() -> None:
    stream = TokenStream("r", lambda _: None)
    reader = paced(stream, lambda: 60.0)

    stream.put(token(0))
    assert [e.new_token_ids for e in await anext(reader)] == [(0,)]
    for number in range(1, 5):
        stream.put(token(number))
        await asyncio.sleep(0)
    stream.put(token(5, FinishReason.LENGTH))

    # The interval is a minute: that this comes at all shows that the end does not wait for it.
    assert [e.new_token_ids[0] for e in await anext(reader)] == [1, 2, 3, 4, 5]
    assert [message async for message in reader] == []


async def test_what_has_gathered_goes_out_when_it_is_due_though_nothing_follows() -> None:
    stream = TokenStream("r", lambda _: None)
    reader = paced(stream, lambda: 0.02)
    stream.put(token(0))
    await anext(reader)
    stream.put(token(1))

    async with asyncio.timeout(5):
        assert [e.new_token_ids[0] for e in await anext(reader)] == [1]


async def test_without_an_interval_nothing_waits() -> None:
    stream = TokenStream("r", lambda _: None)
    task = asyncio.create_task(collect(stream, 0.0))
    for number in range(3):
        stream.put(token(number))
        for _ in range(20):
            await asyncio.sleep(0)
    stream.put(token(3, FinishReason.STOP))

    assert await task == [[0], [1], [2], [3]]


async def test_a_stream_that_is_closed_under_it_ends() -> None:
    stream = TokenStream("r", lambda _: None)
    stream.put(token(0))
    reader = paced(stream, lambda: 0.0)
    await anext(reader)

    stream.close()

    assert [message async for message in reader] == []
