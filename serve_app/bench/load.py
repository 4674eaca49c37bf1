"""The load generator: many streamed requests from one event loop, timed where the bytes arrive.

It speaks raw HTTP/1.1 over asyncio, since a general client costs more CPU per chunk than the
server that is measured. Two ways to offer load: closed loop (a fixed number of requests in flight)
and open loop (Poisson arrivals that wait for nobody, so a slow server cannot slow its own test).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from serve_app.bench.wire import BodyDecoder, ProtocolError, ResponseHead, SseDecoder, parse_head
from serve_app.bench.workloads import RequestSpec
from serve_app.core.errors import ConfigError

_READ_BYTES = 64 * 1024
_DONE = b"[DONE]"
_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Target:
    """The server under load: where it listens, which model is asked for, and with which key."""

    host: str
    port: int
    model: str
    is_tls: bool = False
    api_key: str | None = None
    timeout_s: float = 600.0

    @classmethod
    def from_url(cls, url: str, model: str, **options: Any) -> Target:
        """Parse `http://host:port`; ConfigError where it is none."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url: {url} is not of the form http://host:port", param="url")
        is_tls = parts.scheme == "https"
        port = parts.port or (443 if is_tls else 80)
        return cls(parts.hostname, port, model, is_tls, **options)

    def check_reachable(self) -> None:
        """Raise ConfigError where nothing listens: a whole load would fail request by request."""
        try:
            socket.create_connection((self.host, self.port), _CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise ConfigError(
                f"--url: nothing answers at {self.host}:{self.port} ({error.strerror or error});"
                " start a service with: xeray serve",
                param="url",
            ) from None


@dataclass(slots=True)
class RequestRecord:
    """What became of one request. Times in seconds, from the moment it was sent.

    `itls_s` are the times between the chunks that bring text: with servers that gather tokens a
    chunk holds several. `chunk_chars` are the characters of each of those chunks, the first one
    included. Token counts are the server's own (`usage`). `retry_after_s`: when to come again, as
    a refusal says.
    """

    kind: str
    sent_at_s: float
    ttft_s: float | None = None
    e2el_s: float = 0.0
    itls_s: list[float] = field(default_factory=list)
    chunk_chars: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    status: int | None = None
    retry_after_s: float | None = None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first."""
        if self.ttft_s is None or self.num_output_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.num_output_tokens - 1)


@dataclass(frozen=True, slots=True)
class LoadResult:
    """All requests of a run. `duration_s`: first request sent to last answer complete.

    `client_cpu_s`: CPU time of this process meanwhile. `num_unsent`: requests that the time limit
    left out. `is_cut`: it was interrupted; what was in flight then is not among the records.
    """

    records: tuple[RequestRecord, ...]
    duration_s: float
    client_cpu_s: float
    max_in_flight: int
    num_unsent: int = 0
    is_cut: bool = False


class LoadGenerator:
    """Sends requests to one target and keeps count of those in flight.

    max_duration_s: no request is sent later than this after the first; those in flight go on.
    on_record: told of each request that is complete.
    """

    def __init__(
        self,
        target: Target,
        *,
        max_duration_s: float = math.inf,
        on_record: Callable[[RequestRecord], None] = lambda record: None,
    ) -> None:
        self._target = target
        self._max_duration_s = max_duration_s
        self._on_record = on_record
        self._num_in_flight = 0
        self._max_in_flight = 0
        self._num_unsent = 0
        self._begin_s = 0.0
        self._begin_cpu_s = 0.0
        self._complete: list[RequestRecord] = []

    async def run_closed(self, specs: Sequence[RequestSpec], concurrency: int) -> LoadResult:
        """Keep `concurrency` requests in flight until all are answered."""
        waiting = self._until_the_limit(specs)

        async def work() -> None:
            for spec in waiting:
                await self._send(spec)

        return await self._measure(work() for _ in range(min(concurrency, len(specs))))

    async def run_open(
        self, specs: Sequence[RequestSpec], requests_per_s: float, seed: int = 0
    ) -> LoadResult:
        """Send requests at random times, `requests_per_s` on average, and wait for nobody."""
        rng = random.Random(seed)
        delays_s = []
        elapsed_s = 0.0
        for _ in specs:
            delays_s.append(elapsed_s)
            elapsed_s += rng.expovariate(requests_per_s)

        async def arrive(spec: RequestSpec, delay_s: float) -> None:
            await asyncio.sleep(self._begin_s + delay_s - time.perf_counter())
            await self._send(spec)

        in_time = [delay_s for delay_s in delays_s if delay_s <= self._max_duration_s]
        pairs = zip(specs, in_time, strict=False)
        return await self._measure(
            (arrive(spec, delay_s) for spec, delay_s in pairs), len(specs) - len(in_time)
        )

    def so_far(self, *, is_cut: bool = True) -> LoadResult:
        """Return what is complete: of the run that goes on, was interrupted, or has ended."""
        records = tuple(sorted(self._complete, key=lambda record: record.sent_at_s))
        begin_s = min((record.sent_at_s for record in records), default=0.0)
        end_s = max((record.sent_at_s + record.e2el_s for record in records), default=0.0)
        cpu_s = time.process_time() - self._begin_cpu_s
        return LoadResult(
            records, end_s - begin_s, cpu_s, self._max_in_flight, self._num_unsent, is_cut
        )

    def _until_the_limit(self, specs: Sequence[RequestSpec]) -> Iterator[RequestSpec]:
        for index, spec in enumerate(specs):
            if time.perf_counter() - self._begin_s > self._max_duration_s:
                self._num_unsent = len(specs) - index
                return
            yield spec

    async def _measure(self, work: Iterable[Any], num_unsent: int = 0) -> LoadResult:
        self._max_in_flight = 0
        self._num_unsent = num_unsent
        self._complete = []
        self._begin_s, self._begin_cpu_s = time.perf_counter(), time.process_time()
        await asyncio.gather(*work)
        return self.so_far(is_cut=False)

    async def _send(self, spec: RequestSpec) -> None:
        record = RequestRecord(spec.kind, time.perf_counter())
        self._num_in_flight += 1
        self._max_in_flight = max(self._max_in_flight, self._num_in_flight)
        try:
            async with asyncio.timeout(self._target.timeout_s):
                await self._exchange(spec, record)
        except TimeoutError:
            record.error = f"no complete answer within {self._target.timeout_s:g} s"
        except (OSError, ProtocolError, ValueError) as error:
            record.error = f"{error.__class__.__name__}: {error}"
        finally:
            self._num_in_flight -= 1
            record.e2el_s = time.perf_counter() - record.sent_at_s
        self._complete.append(record)
        self._on_record(record)

    async def _exchange(self, spec: RequestSpec, record: RequestRecord) -> None:
        target = self._target
        context = ssl.create_default_context() if target.is_tls else None
        reader, writer = await asyncio.open_connection(target.host, target.port, ssl=context)
        try:
            writer.write(_request_bytes(target, spec))
            await _read_answer(reader, record)
        finally:
            writer.close()


def _request_bytes(target: Target, spec: RequestSpec) -> bytes:
    body = json.dumps(
        {
            **spec.body,
            "model": target.model,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    lines = [
        f"POST {spec.path} HTTP/1.1",
        f"Host: {target.host}:{target.port}",
        "Content-Type: application/json",
        "Accept: text/event-stream",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    if target.api_key:
        lines.append(f"Authorization: Bearer {target.api_key}")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def _read_answer(reader: asyncio.StreamReader, record: RequestRecord) -> None:
    head, rest = await _read_head(reader)
    body = BodyDecoder(head)
    record.status = head.status
    if head.status != 200:
        with contextlib.suppress(KeyError, ValueError):
            record.retry_after_s = float(head.headers["retry-after"])
        text = b"".join([piece async for piece in _pieces(reader, body, rest)])
        raise ProtocolError(f"HTTP {head.status}: {_error_message(text)}")
    timeline = _Timeline(record)
    events = SseDecoder()
    async for piece in _pieces(reader, body, rest):
        now_s = time.perf_counter()
        for data in events.feed(piece):
            if data == _DONE:
                timeline.close()
                return
            timeline.take(json.loads(data), now_s)
    raise ProtocolError("the stream ended without [DONE]")


async def read_response(reader: asyncio.StreamReader) -> tuple[ResponseHead, bytes]:
    """Return a whole answer: its head, and its body off the transfer coding.

    Raises ProtocolError where the connection ends before the body is complete.
    """
    head, rest = await _read_head(reader)
    decoder = BodyDecoder(head)
    body = b"".join([piece async for piece in _pieces(reader, decoder, rest)])
    is_framed = head.is_chunked or "content-length" in head.headers
    if is_framed and not decoder.is_complete:
        raise ProtocolError("the connection closed within an answer")
    return head, body


async def _read_head(reader: asyncio.StreamReader) -> tuple[ResponseHead, bytes]:
    data = b""
    while (parsed := parse_head(data)) is None:
        more = await reader.read(_READ_BYTES)
        if not more:
            raise ProtocolError("the connection closed before an answer")
        data += more
    return parsed


async def _pieces(
    reader: asyncio.StreamReader, body: BodyDecoder, first: bytes
) -> AsyncIterator[bytes]:
    if first:
        yield body.feed(first)
    while not body.is_complete:
        data = await reader.read(_READ_BYTES)
        if not data:
            return
        yield body.feed(data)


class _Timeline:
    """Turns the events of one stream into its record."""

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        self._last_s: float | None = None
        self._first_chunk_s: float | None = None

    def take(self, event: dict[str, Any], now_s: float) -> None:
        record = self._record
        if "error" in event:
            raise ProtocolError(f"error event: {_message(event['error'])}")
        if usage := event.get("usage"):
            record.num_prompt_tokens = usage["prompt_tokens"]
            record.num_output_tokens = usage["completion_tokens"]
        for choice in event.get("choices") or ():
            if self._first_chunk_s is None:
                self._first_chunk_s = now_s - record.sent_at_s
            record.finish_reason = choice.get("finish_reason") or record.finish_reason
            if num_chars := _num_chars(choice):
                self._take_text(num_chars, now_s)

    def _take_text(self, num_chars: int, now_s: float) -> None:
        if self._last_s is None:
            self._record.ttft_s = now_s - self._record.sent_at_s
        else:
            self._record.itls_s.append(now_s - self._last_s)
        self._last_s = now_s
        self._record.chunk_chars.append(num_chars)

    def close(self) -> None:
        """The stream is complete. An answer without visible text counts from its first chunk."""
        if self._record.ttft_s is None:
            self._record.ttft_s = self._first_chunk_s


def _num_chars(choice: dict[str, Any]) -> int:
    """Characters that a chunk brings, of answer and reasoning."""
    delta = choice.get("delta") or {}
    reasoning = delta.get("reasoning_content") or delta.get("reasoning")  # one text, two names
    return sum(len(text or "") for text in (choice.get("text"), delta.get("content"), reasoning))


def _error_message(body: bytes) -> str:
    try:
        return _message(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", errors="replace")


def _message(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)
