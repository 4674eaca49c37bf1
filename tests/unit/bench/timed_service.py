"""A completions server whose every byte has a set time: what a load generator must measure."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TimedService:
    """Answers each request with its first token after `ttft_s` and then one every `itl_s`.

    Times count from the moment at which the request has arrived, on an absolute schedule, so that a
    late event does not delay those after it. `tokens_per_chunk` gathers several tokens in a chunk.
    `late_s` are how late each chunk was sent: what the measurement cannot be blamed for.
    """

    ttft_s: float
    itl_s: float
    tokens_per_chunk: int = 1
    num_open: int = 0
    max_open: int = 0
    late_s: list[float] = field(default_factory=list)
    url: str = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[TimedService]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()[:2]
        self.url = f"http://{host}:{port}"
        async with server:
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        begin_s = time.perf_counter()
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for index in range(0, body["max_tokens"], self.tokens_per_chunk):
            due_s = begin_s + self.ttft_s + index * self.itl_s
            await asyncio.sleep(due_s - time.perf_counter())
            self.late_s.append(time.perf_counter() - due_s)
            text = "x" * min(self.tokens_per_chunk, body["max_tokens"] - index)
            self._send(writer, {"choices": [{"text": text, "finish_reason": None}]})
        self._send(writer, {"choices": [{"text": "", "finish_reason": "length"}]})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        self._send(writer, {"choices": [], "usage": usage})
        writer.write(b"data: [DONE]\n\n")
        self.num_open -= 1
        writer.close()

    def _send(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        writer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
