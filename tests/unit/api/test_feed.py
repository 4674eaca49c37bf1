from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.api.feed import Feed, Item
from serve_app.core.errors import EngineError
from serve_app.core.requests import GenerateChunk


async def never() -> dict[str, str]:
    await asyncio.Event().wait()
    return {}


async def sequence(
    texts: list[str], closed: list[int], number: int, pauses: list[int]
) -> AsyncGenerator[GenerateChunk, None]:
    try:
        for place, text in enumerate(texts):
            for _ in range(pauses[place % len(pauses)]):
                await asyncio.sleep(0)
            yield GenerateChunk(text=text)
        yield GenerateChunk(finish_reason="stop")
    finally:
        closed.append(number)


async def drain(feed: Feed) -> list[Item]:
    received: list[Item] = []
    while (items := await feed.next()) is not None:
        received += items
    return received


@given(
    st.lists(st.lists(st.text(max_size=3), max_size=6), min_size=1, max_size=5),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
)
def test_each_sequence_arrives_whole_in_order_and_is_closed(sequences, pauses):
    async def run() -> None:
        closed: list[int] = []
        generators = [
            sequence(texts, closed, number, pauses) for number, texts in enumerate(sequences)
        ]
        async with Feed(generators, never) as feed:
            received = await asyncio.wait_for(drain(feed), 5)
        for number, texts in enumerate(sequences):
            own = [chunk for index, chunk in received if index == number]
            assert [chunk.text for chunk in own[:-1]] == texts
            assert own[-1].finish_reason == "stop"
        assert sorted(closed) == list(range(len(sequences)))

    asyncio.run(run())


async def test_failure_comes_after_what_came_before_and_closes_the_rest():
    closed: list[int] = []

    async def failing() -> AsyncGenerator[GenerateChunk, None]:
        yield GenerateChunk(text="before")
        raise EngineError("lost")

    waiting = sequence(["x"], closed, 1, [10**6])
    async with Feed([failing(), waiting], never) as feed:
        items = await feed.next()
        assert [chunk.text for _, chunk in items or ()] == ["before"]
        with pytest.raises(EngineError, match="lost"):
            await feed.next()
    assert closed == [1]


async def test_silence_is_told_only_after_the_start_and_not_while_there_is_news():
    release = asyncio.Event()

    async def slow() -> AsyncGenerator[GenerateChunk, None]:
        yield GenerateChunk(text="a")
        await release.wait()
        yield GenerateChunk(finish_reason="stop")

    async with Feed([slow()], never, keep_alive_s=0.005) as feed:
        assert await feed.next() != []
        feed.start_keep_alive()
        assert await asyncio.wait_for(feed.next(), 5) == []
        assert await asyncio.wait_for(feed.next(), 5) == []
        release.set()
        items = await asyncio.wait_for(feed.next(), 5)
        while items == []:
            items = await asyncio.wait_for(feed.next(), 5)
        assert items is not None
        assert items[0][1].finish_reason == "stop"
        assert await feed.next() is None
