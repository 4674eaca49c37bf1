"""The ingress's end of the token relay: one listening socket, an inbox per request.

Ownership::

    replica A ──TCP──┐                      ┌──> Inbox 1 ──sink──> the request's Feed
    replica B ──TCP──┴─> RelayReceiver ─────┴──> Inbox n ──sink──> the request's Feed

A connection's bytes are taken as they come, whatever a client does: what waits is bounded by the
tokens that a request may have.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import secrets
from collections.abc import Callable
from typing import Any, cast

from serve_app.core.requests import GenerateChunk, RelayTarget, ReplicaLoad
from serve_app.deployments.relay_wire import VERSION, Chain, unpack_chunk, unpack_load
from serve_app.engine.wire import FrameReader

logger = logging.getLogger(__name__)

Sink = Callable[[GenerateChunk], None]
OnLoad = Callable[[str, ReplicaLoad, list[Chain]], None]
_MAX_HELLO_BYTES = 256


class Inbox:
    """What came over the relay for one request: kept until `open`, then handed on as it comes."""

    def __init__(self, target: RelayTarget) -> None:
        self.target = target
        self.is_finished = False
        self._chunks: list[GenerateChunk] = []
        self._sink: Sink | None = None
        self._waiter: asyncio.Future[None] | None = None

    def open(self, sink: Sink | None) -> None:
        """Hand everything to `sink` from now on; None: it waits for `take`."""
        self._sink = sink
        if sink is not None:
            for chunk in self.take():
                sink(chunk)

    def put(self, chunk: GenerateChunk) -> None:
        """Take the next chunk; what follows the last one is dropped."""
        if self.is_finished:
            return
        self.is_finished = chunk.finish_reason is not None or chunk.error is not None
        if self._sink is not None:
            self._sink(chunk)
        else:
            self._chunks.append(chunk)
        if self._sink is None or self.is_finished:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def take(self) -> list[GenerateChunk]:
        """Return what waits."""
        chunks, self._chunks = self._chunks, []
        return chunks

    async def wait(self, other: asyncio.Future[Any], timeout_s: float | None = None) -> None:
        """Wait until something waits here or all has come; or until `other` is done."""
        if self._chunks or self.is_finished:
            return
        self._waiter = asyncio.get_running_loop().create_future()
        waiting = {self._waiter} if other.done() else {self._waiter, other}
        try:
            await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waiter = None


class RelayReceiver:
    """Listens for replicas on `host` (an ephemeral port); `num_chunks` counts what came.

    on_load: told of a replica's load, and of prompts that others have sent to it.
    """

    def __init__(self, on_load: OnLoad = lambda replica_id, load, chains: None) -> None:
        self.num_chunks = 0
        self._on_load = on_load
        self._token = secrets.token_hex(16)
        self._keys = itertools.count(1)
        self._inboxes: dict[int, Inbox] = {}
        self._server: asyncio.Server | None = None
        self._address: tuple[str, int] | None = None
        self._transports: set[asyncio.BaseTransport] = set()

    async def start(self, host: str) -> None:
        """Listen. Raises OSError where it cannot; requests then use Ray's streams alone."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), host, 0)
        self._address = (host, int(self._server.sockets[0].getsockname()[1]))

    def close(self) -> None:
        """Listen no more and end the connections."""
        self._address = None
        if self._server is not None:
            self._server.close()
        for transport in list(self._transports):
            transport.close()

    def add(self) -> Inbox | None:
        """Return an inbox for a new request, None while nothing listens. `remove` it afterwards."""
        if self._address is None:
            return None
        key = next(self._keys)
        inbox = Inbox(RelayTarget(*self._address, self._token, key))
        self._inboxes[key] = inbox
        return inbox

    def remove(self, inbox: Inbox) -> None:
        """Forget a request; what still comes for it is dropped."""
        self._inboxes.pop(inbox.target.key, None)

    @property
    def num_inboxes(self) -> int:
        """Requests that are listened for."""
        return len(self._inboxes)

    def is_welcome(self, frame: list[Any]) -> bool:
        """Whether a connection's first frame is a replica's that heard of us by a request."""
        is_hello = len(frame) == 3 and frame[0] == "hello" and frame[1] == VERSION
        return is_hello and hmac.compare_digest(str(frame[2]).encode(), self._token.encode())

    def on_frame(self, frame: list[Any]) -> None:
        """Take a frame of a connection that is welcome."""
        if frame[0] == "load":
            _, replica_id, load, chains = frame
            self._on_load(replica_id, unpack_load(load), [tuple(chain) for chain in chains])
        else:
            self._on_chunks(frame[1])

    def _on_chunks(self, packed: list[list[Any]]) -> None:
        """Hand the chunks of a frame to their requests."""
        for values in packed:
            inbox = self._inboxes.get(values[0])
            if inbox is not None:
                self.num_chunks += 1
                inbox.put(unpack_chunk(values))


class _Connection(asyncio.Protocol):
    def __init__(self, receiver: RelayReceiver) -> None:
        self._receiver = receiver
        self._frames = FrameReader()
        self._is_welcome = False
        self._num_bytes = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports, which Ray Serve's loops have, are no asyncio.Transport by class.
        self._transport = cast(asyncio.Transport, transport)
        self._receiver._transports.add(self._transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._transport is not None:
            self._receiver._transports.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._take(data)
        except Exception:
            # The replica sees the end of the connection and ends its requests over Ray's streams.
            logger.exception("a token relay's connection sent what cannot be read; closed")
            self._abort()

    def _take(self, data: bytes) -> None:
        for frame in self._frames.feed(data):
            if self._is_welcome:
                self._receiver.on_frame(frame)
            elif self._receiver.is_welcome(frame):
                self._is_welcome = True
            else:
                logger.warning("a connection to the token relay was refused: wrong token")
                self._abort()
                return
        self._num_bytes += len(data)
        if not self._is_welcome and self._num_bytes > _MAX_HELLO_BYTES:
            self._abort()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
