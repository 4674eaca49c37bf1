"""One call to a model replica: its Ray stream, the relay beside it, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol

from ray.serve.handle import DeploymentResponseGenerator

from serve_app.core.errors import EngineError, ErrorInfo, XeRayError
from serve_app.core.requests import GenerateChunk, GenerateRequest
from serve_app.deployments.pools import RoutedCall
from serve_app.deployments.ray_errors import is_ray_error, to_xeray_error
from serve_app.deployments.relay_receiver import Inbox, Sink
from serve_app.deployments.replica_silence import SilenceWatch, WatchedCall

logger = logging.getLogger(__name__)

_LATE_CHUNKS_S = 2.0


class CallSource(Protocol):
    """What a call needs of the backend that opens it."""

    silence: SilenceWatch

    async def open_stream(self, request: GenerateRequest) -> OpenStream:
        """Return a stream whose first chunk is no error. Raises XeRayError."""
        ...

    def remove_inbox(self, inbox: Inbox | None) -> None:
        """Forget an inbox."""
        ...

    def keep(self, task: asyncio.Future[Any]) -> None:
        """Hold a task until it is done."""
        ...


@dataclass(frozen=True, slots=True)
class OpenStream:
    """A call that has answered: its Ray stream, its first chunk, its inbox, its place.

    `watched` tells when its replica has gone silent.
    """

    stream: DeploymentResponseGenerator
    first: GenerateChunk
    inbox: Inbox | None
    call: RoutedCall | None = None
    watched: WatchedCall | None = None

    async def read(self) -> GenerateChunk | None:
        """Return the Ray stream's next chunk, None at its end. Raises XeRayError."""
        if self.watched is None:
            return await _read(self.stream)
        return await self.watched.race(asyncio.ensure_future(_read(self.stream)))

    @property
    def is_silent(self) -> bool:
        """Whether the replica was given up though the call may still run there."""
        return self.watched is not None and self.watched.lost.done()


class RayGeneration(AsyncGenerator[GenerateChunk, None]):
    """The chunks of one call. `push_to` gives it a sink: relayed chunks then go straight there."""

    def __init__(self, backend: CallSource, request: GenerateRequest) -> None:
        self._backend = backend
        self._sink: Sink | None = None
        self._chunks = self._run(request)

    def push_to(self, sink: Sink) -> None:
        """Hand chunks to `sink` in place of yielding them, wherever that saves a wake-up.

        To be called before the first chunk is asked for.
        """
        self._sink = sink

    async def asend(self, value: None) -> GenerateChunk:
        """Return the next chunk, as `anext` does."""
        return await self._chunks.asend(value)

    async def athrow(self, *error: Any) -> GenerateChunk:
        """Raise an error inside of the generator."""
        return await self._chunks.athrow(*error)

    async def aclose(self) -> None:
        """End it; what still runs is aborted."""
        await self._chunks.aclose()

    async def _run(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        opened = await self._backend.open_stream(request)
        stream, chunk = opened.stream, opened.first
        has_ended = False
        try:
            if opened.inbox is not None and chunk.is_relayed:
                yield chunk
                async with contextlib.aclosing(self._relayed(opened, opened.inbox)) as relayed:
                    async for chunk in relayed:
                        has_ended = is_last(chunk)
                        yield chunk
                has_ended = True
                return
            while True:
                has_ended = is_last(chunk)
                yield chunk
                if has_ended:
                    return
                chunk = await opened.read() or GenerateChunk(error=_no_answer())
        except XeRayError:
            has_ended = not opened.is_silent
            raise
        finally:
            if opened.call is not None:
                opened.call.close()
            if opened.watched is not None:
                self._backend.silence.remove(opened.watched)
            self._backend.remove_inbox(opened.inbox)
            is_finished = opened.inbox is not None and opened.inbox.is_finished
            if not has_ended and not is_finished:
                stream.cancel()

    async def _relayed(
        self, opened: OpenStream, inbox: Inbox
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Yield what comes over the relay (nothing, where a sink takes it) up to the end.

        The Ray stream tells when the replica fails or dies, or the relay does.
        """
        lifecycle = asyncio.ensure_future(opened.read())
        self._backend.keep(lifecycle)
        inbox.open(_hearing(opened.watched, self._sink))
        while True:
            for chunk in inbox.take():
                if opened.watched is not None:
                    opened.watched.heard()
                yield chunk
            if inbox.is_finished:
                return
            if lifecycle.done():
                # What was sent before the end may still be on its way.
                last = lifecycle.result()
                await inbox.wait(lifecycle, _LATE_CHUNKS_S if last is None else 0)
                if inbox.is_finished:
                    continue
                yield last or GenerateChunk(error=_no_answer())
                return
            await inbox.wait(lifecycle)


def _hearing(watched: WatchedCall | None, sink: Sink | None) -> Sink | None:
    """Return a sink that notes when something came."""
    if sink is None or watched is None:
        return sink

    def take(chunk: GenerateChunk) -> None:
        watched.heard()
        sink(chunk)

    return take


def is_last(chunk: GenerateChunk) -> bool:
    """Whether nothing follows a chunk."""
    return chunk.finish_reason is not None or chunk.error is not None


def _no_answer() -> ErrorInfo:
    return EngineError("the model replica ended without an answer").info()


async def next_chunk(stream: DeploymentResponseGenerator) -> GenerateChunk:
    """Return the stream's next chunk. Raises XeRayError where the replica fails or dies."""
    return await _read(stream) or GenerateChunk(error=_no_answer())


async def _read(stream: DeploymentResponseGenerator) -> GenerateChunk | None:
    """Return the stream's next chunk, None at its end. Raises XeRayError."""
    try:
        chunk: GenerateChunk = await anext(stream)
    except StopAsyncIteration:
        return None
    except XeRayError:
        raise
    except Exception as error:
        if not is_ray_error(error):
            logger.exception("a model replica failed on a request")
        raise to_xeray_error(error, "model replica") from error
    return chunk
