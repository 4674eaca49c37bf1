"""A small asyncio HTTP server that streams completions as a script says, without sleeping."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeService:
    """Streams `max_tokens` chunks per request; holds each one back until `release` is set.

    `status`: anything but 200 is answered with an OpenAI error body. `cut_after`: the connection
    closes after that many chunks. `error_after`: an error event comes instead of the next chunk.
    """

    status: int = 200
    cut_after: int | None = None
    error_after: int | None = None
    is_chunked: bool = True
    release: asyncio.Event = field(default_factory=asyncio.Event)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    num_open: int = 0
    max_open: int = 0
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)
    url: str = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeService]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()[:2]
        self.url = f"http://{host}:{port}"
        async with server:
            yield self

    async def wait_for_requests(self, count: int) -> None:
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.bodies) >= count)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        async with self.arrived:
            self.heads.append(head)
            self.bodies.append(body)
            self.arrived.notify_all()
        await self.release.wait()
        self.num_open -= 1
        if self.status == 200:
            await self._stream(writer, body)
        else:
            self._refuse(writer)
        writer.close()

    def _refuse(self, writer: asyncio.StreamWriter) -> None:
        text = b'{"error": {"message": "queue is full", "code": "queue_full"}}'
        writer.write(b"HTTP/1.1 %d Nope\r\nContent-Length: %d\r\n\r\n" % (self.status, len(text)))
        writer.write(text)

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        coding = b"Transfer-Encoding: chunked\r\n" if self.is_chunked else b""
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + coding + b"\r\n")
        num_tokens = body["max_tokens"]
        for index in range(num_tokens):
            if index == self.cut_after:
                return
            if index == self.error_after:
                self._send(writer, {"error": {"message": "engine died"}})
                break
            self._send(writer, {"choices": [{"text": f"t{index}", "finish_reason": None}]})
            await writer.drain()
        self._send(writer, {"choices": [{"text": "", "finish_reason": "length"}]})
        usage = {"prompt_tokens": len(body.get("prompt", [])), "completion_tokens": num_tokens}
        self._send(writer, {"choices": [], "usage": usage})
        self._write(writer, b": keep-alive\n\ndata: [DONE]\n\n")
        if self.is_chunked:
            writer.write(b"0\r\n\r\n")

    def _send(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        self._write(writer, b"data: " + json.dumps(event).encode() + b"\n\n")

    def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%s\r\n" % (len(data), data) if self.is_chunked else data)
