"""One call's chunks, from its Ray stream and from the relay; the stream is scripted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import RayActorError

from serve_app.api.feed import Feed, PushSource
from serve_app.core.errors import EngineError, OverloadedError, XeRayError
from serve_app.core.requests import GenerateChunk, GenerateRequest, RelayTarget
from serve_app.core.sampling import SamplingParams
from serve_app.deployments import ray_generation
from serve_app.deployments.ray_backend import RayBackend
from serve_app.deployments.ray_generation import OpenStream, RayGeneration
from serve_app.deployments.relay_receiver import Inbox

REQUEST = GenerateRequest("r", (1,), SamplingParams())
FIRST = GenerateChunk("one", num_generated=1, is_relayed=True)
SECOND = GenerateChunk(" two", num_generated=2)
LAST = GenerateChunk(" three", num_generated=3, finish_reason="stop")


class Stream:
    """A Ray stream: what it still yields or raises is put into it; `None` ends it."""

    def __init__(self) -> None:
        self.items: asyncio.Queue[Any] = asyncio.Queue()
        self.is_cancelled = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        item = await self.items.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None:
        self.is_cancelled = True


class Call(RayBackend):
    """A backend whose one call has answered already."""

    def __init__(self, first: GenerateChunk) -> None:
        self.stream = Stream()
        self.inbox = Inbox(RelayTarget("127.0.0.1", 1, "token", 7))
        self.removed: list[Inbox | None] = []
        self._first = first
        self._tasks = set()

    async def open_stream(self, request: GenerateRequest) -> OpenStream:
        return OpenStream(self.stream, self._first, self.inbox)  # type: ignore[arg-type]

    def remove_inbox(self, inbox: Inbox | None) -> None:
        self.removed.append(inbox)


async def never() -> dict[str, str]:
    await asyncio.Event().wait()
    return {}


async def collect(call: Call) -> list[GenerateChunk]:
    return [chunk async for chunk in RayGeneration(call, REQUEST)]


async def feed_of(call: Call) -> tuple[str, XeRayError | None]:
    """Read a call as a route does; returns its text and how it ended."""
    text = ""
    async with asyncio.timeout(10), Feed([RayGeneration(call, REQUEST)], never) as feed:
        try:
            while (items := await feed.next()) is not None:
                text += "".join(chunk.text for _, chunk in items)
        except XeRayError as error:
            return text, error
    return text, None


def test_the_feed_knows_it_as_a_source_that_pushes() -> None:
    async def check() -> None:
        assert isinstance(RayGeneration(Call(FIRST), REQUEST), PushSource)

    asyncio.run(check())


async def test_relayed_chunks_follow_the_first_even_where_they_overtake_it() -> None:
    call = Call(FIRST)
    for chunk in (SECOND, LAST):
        call.inbox.put(chunk)

    assert await collect(call) == [FIRST, SECOND, LAST]
    assert call.removed == [call.inbox]
    assert not call.stream.is_cancelled


async def test_a_feed_gets_relayed_chunks_straight() -> None:
    call = Call(FIRST)
    asyncio.get_running_loop().call_later(0.02, call.inbox.put, SECOND)
    asyncio.get_running_loop().call_later(0.04, call.inbox.put, LAST)

    assert await feed_of(call) == ("one two three", None)
    assert not call.stream.is_cancelled, "it has ended by itself"


async def test_a_replica_that_dies_ends_it_with_a_typed_error_after_what_came() -> None:
    call = Call(FIRST)
    call.inbox.put(SECOND)
    asyncio.get_running_loop().call_later(0.05, call.stream.items.put_nowait, RayActorError())

    text, error = await feed_of(call)

    assert text == "one two"
    assert isinstance(error, EngineError | OverloadedError)


async def test_a_lost_relay_is_told_over_rays_stream() -> None:
    call = Call(FIRST)
    lost = EngineError("the connection was lost").info()
    call.stream.items.put_nowait(GenerateChunk(error=lost))

    text, error = await feed_of(call)

    assert (text, error.message if error else "") == ("one", "the connection was lost")


async def test_the_end_of_rays_stream_may_overtake_the_last_chunk() -> None:
    call = Call(FIRST)
    call.stream.items.put_nowait(None)
    asyncio.get_running_loop().call_later(0.05, call.inbox.put, LAST)

    assert await feed_of(call) == ("one three", None)


async def test_an_end_without_the_last_chunk_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_generation, "_LATE_CHUNKS_S", 0.01)
    call = Call(FIRST)
    call.stream.items.put_nowait(None)

    text, error = await feed_of(call)

    assert (text, type(error)) == ("one", EngineError)


async def test_closing_cancels_the_call() -> None:
    call = Call(FIRST)
    generation = RayGeneration(call, REQUEST)
    assert await anext(generation) == FIRST

    await generation.aclose()

    assert call.stream.is_cancelled
    assert call.removed == [call.inbox]


async def test_without_a_relay_rays_stream_carries_all() -> None:
    first = GenerateChunk("one", num_generated=1)
    call = Call(first)
    for chunk in (SECOND, LAST):
        call.stream.items.put_nowait(chunk)

    assert await collect(call) == [first, SECOND, LAST]
