"""Runs a job against the backend and writes its answer, streamed or whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import ClassVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.api import sse
from serve_app.api.context import ApiContext, RequestInfo
from serve_app.api.errors import ClientDisconnectedError, error_event, note_error
from serve_app.api.feed import Feed, Item
from serve_app.api.jobs import Job, no_generation, remaining_s
from serve_app.api.output import Output
from serve_app.core.requests import GenerateChunk
from serve_app.observability.metrics import SequenceTimer
from serve_app.observability.tracing import Attribute, current_span


class GenerationResponse(Response):
    """The answer to a job.

    Nothing is sent before the first chunk, so that an error up to there is raised and becomes a
    real status; a later one becomes an event of the stream. However it ends, all generators are
    closed.
    """

    end_of_stream: ClassVar[bytes] = sse.DONE

    def __init__(self, context: ApiContext, info: RequestInfo, job: Job, output: Output) -> None:
        self._context = context
        self._info = info
        self._job = job
        self._output = output
        self._timers = [context.metrics.start_sequence(info.arrival_s) for _ in job.requests]
        self._num_charged = [0] * len(job.requests)
        self._open = set(range(len(job.requests)))
        self._reasons: list[str] = []
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generate and answer. Raises XeRayError before the first byte; never after it."""
        left_s = remaining_s(self._context, self._info)
        feed = Feed(
            [self._generator(index) for index in range(len(self._job.requests))],
            receive,
            deadline_s=None if left_s is None else asyncio.get_running_loop().time() + left_s,
            keep_alive_s=self._context.config.ingress.keep_alive_interval_s,
        )
        reason = "abort"
        try:
            async with feed:
                if self._job.stream:
                    await self._stream(feed, send)
                else:
                    await self._answer(feed, send)
        except ClientDisconnectedError:
            self._info.is_client_gone = True
        except Exception:
            reason = "error"
            raise
        finally:
            self._finish_open(reason)
            self._tell_span()

    def failure_events(self, error: Exception) -> bytes:
        """Return what tells of an error within a stream."""
        return error_event(error, self._info.request_id)

    def _tell_span(self) -> None:
        num_prompt = sum(len(prompt.token_ids) for prompt in self._job.prompts)
        told: dict[str, Attribute] = {
            "gen_ai.response.id": self._job.id,
            "gen_ai.response.finish_reasons": tuple(self._reasons),
            "gen_ai.usage.input_tokens": num_prompt,
            "gen_ai.usage.output_tokens": sum(timer.num_generated for timer in self._timers),
        }
        first_s = [t.first_token_s for t in self._timers if t.first_token_s is not None]
        if first_s:
            told["gen_ai.response.time_to_first_chunk"] = min(first_s) - self._info.arrival_s
        current_span().set(told)

    def _generator(self, index: int) -> AsyncGenerator[GenerateChunk, None]:
        request = self._job.requests[index]
        if request.sampling.max_tokens == 0 and request.sampling.prompt_logprobs is None:
            return no_generation(len(request.prompt_token_ids))
        return self._context.backend.generate(self._job.card.id, request)

    async def _answer(self, feed: Feed, send: Send) -> None:
        while (items := await feed.next()) is not None:
            for index, chunk in items:
                self._observe(index, chunk)
                self._output.add(index, chunk)
        body = self._output.answer()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, feed: Feed, send: Send) -> None:
        items = await feed.next()
        await send({"type": "http.response.start", "status": 200, "headers": [*sse.HEADERS]})
        feed.start_keep_alive()
        try:
            while items is not None:
                data = self._render(items) if items else sse.KEEP_ALIVE
                if data:
                    await self._write(feed, send, data)
                items = await feed.next()
            closing = self._output.closing_events() + self.end_of_stream
        except (ClientDisconnectedError, OSError):
            raise ClientDisconnectedError from None
        except Exception as error:
            # The status has gone out already: the error travels as an event.
            closing = self.failure_events(error) + self.end_of_stream
            note_error(self._context.metrics, self._info.endpoint, self._info.request_id, error)
            self._finish_open("error")
        await send({"type": "http.response.body", "body": closing})

    async def _write(self, feed: Feed, send: Send, data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})
        feed.written()

    def _render(self, items: list[Item]) -> bytes:
        parts = []
        for index, chunk in items:
            self._observe(index, chunk)
            parts.append(self._output.events(index, chunk))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _observe(self, index: int, chunk: GenerateChunk) -> None:
        timer = self._timers[index]
        if timer.first_token_s is None:
            timer.on_engine_times(chunk.queue_time_s, chunk.engine_ttft_s)
        timer.on_tokens(chunk.num_prompt, chunk.num_generated)
        self._charge(index)
        if chunk.finish_reason is not None:
            self._open.discard(index)
            self._finish(timer, index, chunk.finish_reason)

    def _charge(self, index: int) -> None:
        """Count a sequence's tokens so far at its key: a limit holds while streams run."""
        if self._info.lease is not None:
            timer = self._timers[index]
            num_tokens = timer.num_prompt + timer.num_generated
            self._info.lease.add_tokens(num_tokens - self._num_charged[index])
            self._num_charged[index] = num_tokens

    def _finish_open(self, reason: str) -> None:
        for index in self._open:
            self._finish(self._timers[index], index, reason)
        self._open.clear()

    def _finish(self, timer: SequenceTimer, index: int, reason: str) -> None:
        timer.on_finish(reason, len(self._job.prompt_of(index).token_ids))
        self._reasons.append(reason)
        if self._info.lease is not None:
            self._charge(index)
            self._context.metrics.count_key_tokens(
                self._info.lease.entry.name, timer.num_prompt, timer.num_generated
            )
