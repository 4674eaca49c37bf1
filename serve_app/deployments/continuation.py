"""Streams that lose their replica go on at another one, from the prompt and the tokens so far.

Ownership::

    replica A ──chunks──> call 1 ──┐
                 (lost)            ├──> ContinuedGeneration ──> the request's Feed
    replica B ──chunks──> call 2 ──┘      keeps the ids that went out

What went out stays out: a chunk's text and ids arrive together or not at all, and the next replica
replays the ids to stand where the last one stood (half a character, the beginning of a stop
string). What cannot go on ends with the error that cut it off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from serve_app.api.feed import PushSource
from serve_app.core.errors import EngineError, XeRayError, error_from_info
from serve_app.core.requests import GenerateChunk, GenerateRequest

logger = logging.getLogger(__name__)

Call = AsyncGenerator[GenerateChunk, None]
Sink = Callable[[GenerateChunk], None]

MAX_MOVES = 3
"""A request that loses this many replicas after its first token may be what kills them."""

_RETRY_S = 0.25


@dataclass(frozen=True, slots=True)
class ContinuationPolicy:
    """Which streams go on elsewhere, and how long each may look for a replica (seconds).

    deterministic: greedy or seeded ones, whose text is then what it would have been; all: sampled
    ones as well, whose rest is another draw of the same distribution.
    """

    streams: Literal["off", "deterministic", "all"] = "deterministic"
    patience_s: float = 30.0

    def allows(self, request: GenerateRequest) -> bool:
        """Whether the request's stream may go on at another replica."""
        if self.streams == "deterministic":
            return request.sampling.is_greedy or request.sampling.seed is not None
        return self.streams == "all"


@dataclass(slots=True)
class _Loss:
    """How a call was cut off: an error that was raised, or the chunk that told of it."""

    error: XeRayError
    chunk: GenerateChunk | None

    def may_pass(self) -> bool:
        """Whether another replica may do better."""
        if self.chunk is not None and self.chunk.error is not None:
            return self.chunk.error.is_retryable
        return self.error.is_retryable


class ContinuedGeneration(AsyncGenerator[GenerateChunk, None]):
    """The chunks of one request, over as many calls as it takes.

    `open_call` starts a call; one that is a PushSource gets the sink of `push_to`. `on_continued`
    is told each time a stream has its next token from another replica.
    """

    def __init__(
        self,
        open_call: Callable[[GenerateRequest], Call],
        request: GenerateRequest,
        policy: ContinuationPolicy,
        on_continued: Callable[[], None] = lambda: None,
    ) -> None:
        self._open_call = open_call
        self._request = request
        self._policy = policy
        self._on_continued = on_continued
        self._sink: Sink | None = None
        self._token_ids: list[int] = []
        self._num_moves = 0
        self._num_calls = 0
        self._is_moving = False
        self._pushed_loss: GenerateChunk | None = None
        self._chunks = self._run()

    def push_to(self, sink: Sink) -> None:
        """Hand chunks to `sink` in place of yielding them, wherever that saves a wake-up."""
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

    async def _run(self) -> AsyncGenerator[GenerateChunk, None]:
        first_loss: _Loss | None = None
        lost_s = 0.0
        while True:
            call = self._start()
            raised: XeRayError | None = None
            told: GenerateChunk | None = None
            async with contextlib.aclosing(call):
                try:
                    async for chunk in call:
                        if _tells_of_loss(chunk):
                            told = chunk
                            break
                        self._note(chunk)
                        yield chunk
                except XeRayError as error:
                    raised = error
            told, self._pushed_loss = told or self._pushed_loss, None
            loss = _loss_of(raised, told)
            if loss is None:
                return
            if not self._is_moving:  # a loss while it looks for a replica changes nothing
                first_loss, lost_s = loss, time.monotonic()
            assert first_loss is not None
            if not self._can_move(loss, time.monotonic() - lost_s):
                if first_loss.chunk is None:
                    raise first_loss.error
                yield first_loss.chunk
                return
            await self._prepare_move(loss)

    def _start(self) -> Call:
        request = self._request
        if self._token_ids:
            request = replace(
                request,
                # The sequence that was lost may still be known where this one goes.
                request_id=f"{request.request_id}+{self._num_calls}",
                generated_token_ids=tuple(self._token_ids),
            )
        self._num_calls += 1
        call = self._open_call(request)
        if self._sink is not None and isinstance(call, PushSource):
            call.push_to(self._take)
        return call

    def _take(self, chunk: GenerateChunk) -> None:
        """Hand a chunk on, unless it tells of a loss: that is decided in `_run`."""
        assert self._sink is not None
        if _tells_of_loss(chunk):
            self._pushed_loss = chunk
            return
        self._note(chunk)
        self._sink(chunk)

    def _note(self, chunk: GenerateChunk) -> None:
        self._token_ids.extend(chunk.token_ids)
        if self._is_moving:
            self._is_moving = False
            self._num_moves += 1
            self._on_continued()

    def _can_move(self, loss: _Loss, searched_s: float) -> bool:
        return (
            bool(self._token_ids)
            and loss.may_pass()
            and self._num_moves < MAX_MOVES
            and searched_s < self._policy.patience_s
            and self._policy.allows(self._request)
        )

    async def _prepare_move(self, loss: _Loss) -> None:
        if self._is_moving:
            await asyncio.sleep(_RETRY_S)
            return
        self._is_moving = True
        logger.warning(
            "request %s goes on at another replica after %d tokens: %s",
            self._request.request_id,
            len(self._token_ids),
            loss.error.message,
        )


def _tells_of_loss(chunk: GenerateChunk) -> bool:
    """Whether a chunk is the last one of a call that did not finish; nobody here aborts one."""
    return chunk.error is not None or chunk.finish_reason in ("aborted", "error")


def _loss_of(raised: XeRayError | None, told: GenerateChunk | None) -> _Loss | None:
    if raised is not None:
        return _Loss(raised, None)
    if told is None:
        return None
    if told.error is None:
        return _Loss(EngineError("the model replica ended the generation"), told)
    return _Loss(error_from_info(told.error), told)
