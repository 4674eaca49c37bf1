"""One mailbox for everything that can happen to a running request.

Ownership::

    generator 0 ──pump task──┐
    generator n ──pump task──┤
    receive() ──watch task───┼──> Feed ──next()──> the route (one reader)
    deadline timer ──────────┤
    silence timer ───────────┘

Leaving the `async with` block cancels the tasks and closes the generators, which aborts the
sequences; it does so however the block is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from types import TracebackType
from typing import Protocol, runtime_checkable

from starlette.types import Receive

from serve_app.api.errors import ClientDisconnectedError
from serve_app.core.errors import DeadlineError, EngineError, error_from_info
from serve_app.core.requests import GenerateChunk

Item = tuple[int, GenerateChunk]


@runtime_checkable
class PushSource(Protocol):
    """A generator that can hand chunks over without a task that waits for each."""

    def push_to(self, sink: Callable[[GenerateChunk], None]) -> None:
        """Call `sink` with chunks, in order with those that are yielded, up to the last one."""
        ...


class Feed:
    """Merges the chunks of several sequences, and tells of silence, disconnects and the deadline.

    `deadline_s` is an instant of the running loop's clock; `keep_alive_s` a length of silence.
    """

    def __init__(
        self,
        generators: Sequence[AsyncGenerator[GenerateChunk, None]],
        receive: Receive,
        *,
        deadline_s: float | None = None,
        keep_alive_s: float | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._generators = generators
        self._receive = receive
        self._deadline_s = deadline_s
        self._keep_alive_s = keep_alive_s
        self._items: list[Item] = []
        self._failure: Exception | None = None
        self._num_open = len(generators)
        self._is_open = [True] * len(generators)
        self._waiter: asyncio.Future[None] | None = None
        self._is_silent = False
        self._last_write_s = self._loop.time()
        self._tasks: list[asyncio.Task[None]] = []
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._silence_timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Feed:
        for index, generator in enumerate(self._generators):
            self._tasks.append(asyncio.create_task(self._pump(index, generator)))
        self._tasks.append(asyncio.create_task(self._watch_client()))
        if self._deadline_s is not None:
            self._deadline_timer = self._loop.call_at(self._deadline_s, self._on_deadline)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for timer in (self._deadline_timer, self._silence_timer):
            if timer is not None:
                timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def next(self) -> list[Item] | None:
        """Wait, then return everything that has come: [] means silence, None the end of all.

        Raises what ended the request early (XeRayError, ClientDisconnectedError), but only after
        the chunks that came before it.
        """
        while not self._items:
            if self._num_open == 0:
                return None
            if self._failure is not None:
                raise self._failure
            if self._is_silent:
                self._is_silent = False
                return []
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items, self._items = self._items, []
        return items

    def start_keep_alive(self) -> None:
        """From now on report silence; called once the answer has begun."""
        self.written()
        if self._keep_alive_s is not None:
            due_s = self._last_write_s + self._keep_alive_s
            self._silence_timer = self._loop.call_at(due_s, self._on_silence)

    def written(self) -> None:
        """Note that bytes went to the client just now."""
        self._last_write_s = self._loop.time()

    async def _pump(self, index: int, generator: AsyncGenerator[GenerateChunk, None]) -> None:
        try:
            if isinstance(generator, PushSource):
                generator.push_to(lambda chunk: self._take(index, chunk))
            async for chunk in generator:
                self._take(index, chunk)
                if not self._is_open[index]:
                    return
            if self._is_open[index]:
                self._fail(EngineError("The generation ended without a reason."))
        except Exception as error:
            self._fail(error)
        finally:
            await generator.aclose()

    def _take(self, index: int, chunk: GenerateChunk) -> None:
        """Note a chunk of a sequence; nothing counts after its last one."""
        if not self._is_open[index]:
            return
        if chunk.error is not None:
            self._is_open[index] = False
            if chunk.text:
                self._items.append((index, chunk))
            self._fail(error_from_info(chunk.error))
            return
        if chunk.finish_reason in ("aborted", "error"):
            self._is_open[index] = False
            self._fail(EngineError("The generation was ended by the server."))
            return
        self._items.append((index, chunk))
        if chunk.finish_reason is not None:
            self._is_open[index] = False
            self._num_open -= 1
        self._wake()

    async def _watch_client(self) -> None:
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
        finally:
            self._fail(ClientDisconnectedError())

    def _on_deadline(self) -> None:
        self._fail(DeadlineError("The request took longer than the server allows."))

    def _on_silence(self) -> None:
        assert self._keep_alive_s is not None
        due_s = self._last_write_s + self._keep_alive_s
        if due_s <= self._loop.time():
            self._is_silent = True
            self._wake()
            due_s = self._loop.time() + self._keep_alive_s
        self._silence_timer = self._loop.call_at(due_s, self._on_silence)

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
