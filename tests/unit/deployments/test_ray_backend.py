"""A request that waits at a full replica follows its place to another; handles are scripted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from serve_app.core.errors import EngineError
from serve_app.core.requests import GenerateChunk, GenerateRequest, ReplicaHealth, ReplicaLoad
from serve_app.core.sampling import SamplingParams
from serve_app.deployments.pools import ModelPools, Pool
from serve_app.deployments.ray_backend import RayBackend
from serve_app.deployments.ray_generation import OpenStream
from serve_app.deployments.replica_monitor import ReplicaMonitor
from serve_app.deployments.routing import ReplicaRouter
from tests.unit.deployments.test_ray_generation import Stream

FIRST = GenerateChunk("one", num_generated=1)


class Handle:
    """A deployment's handle: keeps each call's request and stream."""

    def __init__(self) -> None:
        self.calls: list[tuple[GenerateRequest, Stream]] = []

    def options(self, *, stream: bool) -> Handle:
        assert stream
        return self

    @property
    def generate(self) -> Handle:
        return self

    def remote(self, request: GenerateRequest) -> Stream:
        self.calls.append((request, Stream()))
        return self.calls[-1][1]


class Service:
    """Two replicas with a place each, behind a backend."""

    def __init__(self) -> None:
        self.handle = Handle()
        self.router = ReplicaRouter()
        pools = ModelPools([Pool("default", self.handle)], self.router)  # type: ignore[arg-type]
        self.backend = RayBackend(None, pools)  # type: ignore[arg-type]
        self.backend.monitor = ReplicaMonitor(self._ask)
        self.num_moved = 0
        self.backend.on_moved = self._count

    async def _ask(self) -> list[ReplicaHealth]:
        load = ReplicaLoad(max_num_seqs=1, mean_service_s=5.0)
        return [ReplicaHealth(name, "ready", load=load) for name in "ab"]

    def _count(self) -> None:
        self.num_moved += 1

    async def begin(self) -> None:
        await self.backend.monitor.refresh()
        self.router.update([(0, h) for h in await self._ask()], asyncio.get_running_loop().time())

    def ask(self, name: str) -> asyncio.Task[OpenStream]:
        request = GenerateRequest(name, (1, 2, 3), SamplingParams())
        return asyncio.create_task(self.backend.open_stream(request))

    async def calls(self, count: int) -> list[tuple[str | None, Stream]]:
        """Wait for that many calls; returns each one's replica and stream."""
        async with asyncio.timeout(5):
            while len(self.handle.calls) < count:
                await asyncio.sleep(0)
        return [(request.target_replica, stream) for request, stream in self.handle.calls]

    async def running(self) -> dict[str | None, tuple[OpenStream, Stream]]:
        """Take both places."""
        opened = {}
        for number in (1, 2):
            task = self.ask(f"running{number}")
            name, stream = (await self.calls(number))[-1]
            stream.items.put_nowait(FIRST)
            opened[name] = (await task, stream)
        assert set(opened) == {"a", "b"}
        return opened


async def _waiting(service: Service) -> tuple[Callable[[], None], asyncio.Task[OpenStream], str]:
    """Let a request wait; returns what frees the other replica, its task, and where it waits."""
    await service.begin()
    running = await service.running()
    task = service.ask("waiting")
    here, _ = (await service.calls(3))[2]
    assert here is not None
    call = running["b" if here == "a" else "a"][0].call
    assert call is not None
    return call.close, task, here


async def test_it_is_taken_back_and_sent_to_the_replica_that_came_free() -> None:
    service = Service()
    free_other, task, here = await _waiting(service)

    free_other()
    calls: list[Any] = await service.calls(4)

    assert calls[2][1].is_cancelled
    assert calls[3][0] == ("b" if here == "a" else "a")
    names = [request.request_id for request, _ in service.handle.calls]
    assert len(set(names)) == 4, "a replica may know the cancelled call still"
    calls[3][1].items.put_nowait(FIRST)
    opened = await asyncio.wait_for(task, 5)
    assert opened.first == FIRST
    assert opened.call is not None
    assert opened.call.replica_id == calls[3][0]
    assert (service.num_moved, calls[3][1].is_cancelled) == (1, False)


async def test_a_first_chunk_that_came_meanwhile_is_not_thrown_away() -> None:
    service = Service()
    free_other, task, here = await _waiting(service)
    stream = (await service.calls(3))[2][1]

    stream.items.put_nowait(FIRST)
    for _ in range(8):  # it is read, but the request does not know yet
        if stream.items.empty():
            break
        await asyncio.sleep(0)
    free_other()
    opened = await asyncio.wait_for(task, 5)

    assert opened.first == FIRST
    assert (len(service.handle.calls), stream.is_cancelled) == (3, False)
    assert opened.call is not None
    assert opened.call.ticket is not None
    assert opened.call.ticket.replica_id == here, "the place is where it runs"


async def test_one_whose_client_leaves_gives_back_the_place_it_moved_to() -> None:
    service = Service()
    free_other, task, here = await _waiting(service)
    free_other()
    calls = await service.calls(4)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert calls[3][1].is_cancelled
    ticket = service.router.choose("next", (1, 2, 3))
    assert ticket is not None
    assert ticket.replica_id == ("b" if here == "a" else "a"), "it is the free one"


async def test_one_that_fails_where_it_moved_to_is_tried_again_elsewhere() -> None:
    service = Service()
    free_other, task, here = await _waiting(service)
    free_other()
    calls = await service.calls(4)

    failure = EngineError("it broke").info()
    calls[3][1].items.put_nowait(GenerateChunk(error=failure))
    again, stream = (await service.calls(5))[4]
    stream.items.put_nowait(FIRST)

    assert (await asyncio.wait_for(task, 5)).first == FIRST
    assert again == here
