"""Runs the inputs of an embeddings request, a few at a time, and writes the answer."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
from array import array
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.api.context import ApiContext, RequestInfo
from serve_app.api.errors import ClientDisconnectedError
from serve_app.api.feed import Feed
from serve_app.api.jobs import remaining_s
from serve_app.api.protocol.embeddings import EmbeddingAnswer, EmbeddingEntry, EmbeddingUsage
from serve_app.api.sse import json_bytes
from serve_app.core.errors import EngineError
from serve_app.core.requests import GenerateChunk, GenerateRequest, ModelCard
from serve_app.observability.tracing import current_span

MAX_IN_FLIGHT = 16
"""Inputs of one request that replicas hold at once: a long list must not fill their queues."""


@dataclass(frozen=True, slots=True)
class EmbeddingJob:
    """A validated request. `size`: values of each vector; `is_base64`: how they are written."""

    card: ModelCard
    requests: tuple[GenerateRequest, ...]
    size: int
    is_base64: bool


class EmbeddingsResponse(Response):
    """The answer to a job: whole, or the error that ended it; what runs is aborted then."""

    def __init__(self, context: ApiContext, info: RequestInfo, job: EmbeddingJob) -> None:
        self._context = context
        self._info = info
        self._job = job
        self._num_tokens = 0
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Embed and answer. Raises XeRayError before the first byte; never after it."""
        try:
            vectors = await self._embed(self._job.requests, receive)
        except ClientDisconnectedError:
            self._info.is_client_gone = True
            return
        body = await asyncio.to_thread(self._answer, vectors)
        current_span().set({"gen_ai.usage.input_tokens": self._num_tokens})
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _gated(
        self, request: GenerateRequest, gate: asyncio.Semaphore
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Yield an input's chunks once it is its turn."""
        async with gate:
            chunks = self._context.backend.generate(self._job.card.id, request)
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    yield chunk

    async def _embed(self, requests: tuple[GenerateRequest, ...], receive: Receive) -> list[bytes]:
        """Return the inputs' vectors; at most MAX_IN_FLIGHT of them are with replicas at once."""
        gate = asyncio.Semaphore(MAX_IN_FLIGHT)
        left_s = remaining_s(self._context, self._info)
        feed = Feed(
            [self._gated(request, gate) for request in requests],
            receive,
            deadline_s=None if left_s is None else asyncio.get_running_loop().time() + left_s,
        )
        timers = [self._context.metrics.start_sequence(self._info.arrival_s) for _ in requests]
        vectors: dict[int, bytes] = {}
        reason = "abort"
        try:
            async with feed:
                while (items := await feed.next()) is not None:
                    for index, chunk in items:
                        if chunk.embedding is None:
                            raise EngineError("The engine gave no vector.")
                        vectors[index] = chunk.embedding
                        timers[index].on_finish("stop", len(requests[index].prompt_token_ids))
                        self._count(requests[index])
        except ClientDisconnectedError:
            raise
        except Exception:
            reason = "error"
            raise
        finally:
            for index in range(len(requests)):
                if index not in vectors:
                    timers[index].on_finish(reason, len(requests[index].prompt_token_ids))
        return [vectors[index] for index in range(len(requests))]

    def _count(self, request: GenerateRequest) -> None:
        num_tokens = len(request.prompt_token_ids)
        self._num_tokens += num_tokens
        lease = self._info.lease
        if lease is not None:
            lease.add_tokens(num_tokens)
            self._context.metrics.count_key_tokens(lease.entry.name, num_tokens, 0)

    def _answer(self, vectors: list[bytes]) -> bytes:
        usage = EmbeddingUsage(prompt_tokens=self._num_tokens, total_tokens=self._num_tokens)
        data = [
            EmbeddingEntry(index=index, embedding=self._written(vector))
            for index, vector in enumerate(vectors)
        ]
        answer = EmbeddingAnswer(data=data, model=self._job.card.id, usage=usage)
        return json_bytes(answer.model_dump())

    def _written(self, vector: bytes) -> list[float] | str:
        values = shortened(vector, self._job.size)
        if self._job.is_base64:
            return base64.b64encode(values.tobytes()).decode()
        return values.tolist()


def shortened(vector: bytes, size: int) -> array[float]:
    """Return a vector's first `size` values, float32, of length 1 again where some are left out.

    `vector`: float32 values, little-endian, as all our hosts are.
    """
    values = array("f", vector)
    if size >= len(values):
        return values
    first = values[:size]
    length = math.sqrt(sum(value * value for value in first))
    return array("f", (value / length for value in first)) if length else first
