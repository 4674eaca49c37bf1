"""The model replica's end of the token relay: a step's events become one frame per ingress.

Ownership::

    engine step ──> TokenStream 1..n ──> RelaySender ──flush──> RelayLink ──TCP──> ingress replica

No task and no timer of a stream's own: events of diverted streams gather here, and one timer
flushes them all, once per interval; a sequence that ended goes out with the step that ended it. A
step never waits: an ingress that takes nothing fills its link's buffer up to a bound, then the link
is cut and its requests end with a typed error over their Ray streams.

Departure from DESIGN (one Ray stream carries the text): a message through Ray costs 0.25 to 0.9 ms
of CPU on two cores, each taken from the engine's threads. The Ray stream stays open for every
request, so Serve's back-pressure, autoscaling, cancellation and draining stay true: it carries the
first chunk, so that an error before it is a real status, its end, and failures of the relay.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from serve_app.core.errors import EngineError, ErrorInfo
from serve_app.core.events import TokenEvent
from serve_app.core.requests import GenerateChunk, RelayTarget
from serve_app.deployments.relay_wire import VERSION, pack_chunk
from serve_app.engine.token_stream import TokenStream
from serve_app.engine.wire import pack_frame
from serve_app.text.output import OutputProcessor

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 1.0
RETRY_AFTER_S = 10.0
"""An ingress that could not be reached is tried again then; until then Ray carries all."""
MAX_BUFFER_BYTES = 8 << 20
"""About 100,000 chunks that an ingress did not take."""

Address = tuple[str, int, str]


class RelayedSequence:
    """One request whose chunks go over the relay; `ended` gets None, or what cut it off."""

    def __init__(
        self, link: RelayLink, key: int, stream: TokenStream, processor: OutputProcessor
    ) -> None:
        self.link = link
        self.key = key
        self.processor = processor
        self.events: list[TokenEvent] = []
        self.ended: asyncio.Future[ErrorInfo | None] = asyncio.get_running_loop().create_future()
        self._stream = stream

    def take(self) -> GenerateChunk | None:
        """Return what has gathered as a chunk; a sequence that a stop string ended is aborted."""
        events, self.events = self.events, []
        chunk = self.processor.push(events) if events else None
        if self.processor.is_stopped_by_string:
            self._stream.close()
        return chunk

    def end(self, error: ErrorInfo | None = None) -> None:
        """Nothing follows."""
        if not self.ended.done():
            self.ended.set_result(error)


class RelayLink(asyncio.Protocol):
    """The connection to one ingress replica."""

    def __init__(self, on_lost: Callable[[RelayLink, ErrorInfo], None]) -> None:
        self.sequences: set[RelayedSequence] = set()
        self.is_open = False
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        # uvloop's transports, which Ray Serve's loops have, are no asyncio.Transport by class.
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def connection_lost(self, error: Exception | None) -> None:
        """Called by asyncio."""
        self._lose("the connection between model replica and ingress was lost")

    def send(self, frame: bytes) -> None:
        """Write without waiting; cut the link where the ingress has taken too little."""
        if not self.is_open or self._transport is None:
            return
        self._transport.write(frame)
        if self._transport.get_write_buffer_size() > MAX_BUFFER_BYTES:
            self._lose("the ingress did not take its chunks")

    def close(self) -> None:
        """End the connection; what was written still goes out."""
        self.is_open = False
        if self._transport is not None:
            self._transport.close()

    def _lose(self, why: str) -> None:
        if self.is_open:
            self.is_open = False
            if self._transport is not None:
                self._transport.abort()
            self._on_lost(self, EngineError(why).info())


class RelaySender:
    """Gathers the chunks of all relayed sequences. All calls come from one event loop.

    `interval_s` is asked at each flush, so the pace follows the load. `on_progress` is told that
    the engine gave tokens. `num_lost` counts sequences that a failing link cut off, `num_sent` the
    chunks that went out.
    """

    def __init__(
        self, interval_s: Callable[[], float], on_progress: Callable[[], None] = lambda: None
    ) -> None:
        self.num_lost = 0
        self.num_sent = 0
        self._interval_s = interval_s
        self._on_progress = on_progress
        self._links: dict[Address, asyncio.Task[RelayLink | None]] = {}
        self._gathering: dict[RelayedSequence, None] = {}
        self._ending: dict[RelayedSequence, None] = {}
        self._timer: asyncio.Handle | None = None
        self._ending_handle: asyncio.Handle | None = None
        self._last_flush_s = 0.0

    async def link_to(self, target: RelayTarget) -> RelayLink | None:
        """Return the link to the target's ingress, made now if there is none; None: no way."""
        address = (target.host, target.port, target.token)
        task = self._links.get(address)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._connect(address))
            self._links[address] = task
        link = await asyncio.shield(task)
        return link if link is not None and link.is_open else None

    def add(
        self, link: RelayLink, key: int, stream: TokenStream, processor: OutputProcessor
    ) -> RelayedSequence:
        """Take over a stream's events from now on; `remove` it afterwards."""
        sequence = RelayedSequence(link, key, stream, processor)
        link.sequences.add(sequence)
        stream.divert(lambda event: self._on_event(sequence, event))
        if not link.is_open:
            self._cut(sequence, EngineError("the connection to the ingress was lost").info())
        return sequence

    def remove(self, sequence: RelayedSequence) -> None:
        """Forget a sequence, finished or not."""
        sequence.link.sequences.discard(sequence)
        self._gathering.pop(sequence, None)
        self._ending.pop(sequence, None)

    def open_links(self) -> list[RelayLink]:
        """Return the links that carry chunks, one for each ingress that asked for some."""
        ready = [task.result() for task in self._links.values() if task.done()]
        return [link for link in ready if link is not None and link.is_open]

    def close(self) -> None:
        """Close all links."""
        for task in self._links.values():
            task.cancel()
            if task.done() and not task.cancelled() and (link := task.result()) is not None:
                link.close()
        self._links.clear()
        for handle in (self._timer, self._ending_handle):
            if handle is not None:
                handle.cancel()

    async def _connect(self, address: Address) -> RelayLink | None:
        loop = asyncio.get_running_loop()
        host, port, token = address
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, link = await loop.create_connection(
                    lambda: RelayLink(lambda link, why: self._on_lost(address, link, why)),
                    host,
                    port,
                )
        except (OSError, TimeoutError) as error:
            logger.warning("no relay to the ingress at %s:%d: %r", host, port, error)
            loop.call_later(RETRY_AFTER_S, self._links.pop, address, None)
            return None
        link.send(pack_frame("hello", VERSION, token))
        return link

    def _on_lost(self, address: Address, link: RelayLink, why: ErrorInfo) -> None:
        self._links.pop(address, None)
        for sequence in list(link.sequences):
            self._cut(sequence, why)

    def _cut(self, sequence: RelayedSequence, why: ErrorInfo) -> None:
        self.num_lost += 1
        self.remove(sequence)
        sequence.end(why)

    def _on_event(self, sequence: RelayedSequence, event: TokenEvent) -> None:
        if sequence.ended.done():
            return
        sequence.events.append(event)
        if event.finish_reason is not None:
            self._ending[sequence] = None
            if self._ending_handle is None:
                # After the rest of the step's events, which are handed out in this callback.
                self._ending_handle = asyncio.get_running_loop().call_soon(self._flush_ending)
            return
        self._gathering[sequence] = None
        if self._timer is None:
            loop = asyncio.get_running_loop()
            due_s = self._last_flush_s + self._interval_s()
            if due_s <= loop.time():
                self._timer = loop.call_soon(self._flush)
            else:
                self._timer = loop.call_at(due_s, self._flush)

    def _flush(self) -> None:
        self._timer = None
        self._last_flush_s = asyncio.get_running_loop().time()
        gathering, self._gathering = self._gathering, {}
        self._send(gathering)

    def _flush_ending(self) -> None:
        self._ending_handle = None
        ending, self._ending = self._ending, {}
        for sequence in ending:
            self._gathering.pop(sequence, None)
        self._send(ending)

    def _send(self, sequences: dict[RelayedSequence, None]) -> None:
        self._on_progress()
        frames: dict[RelayLink, list[object]] = {}
        finished = []
        for sequence in sequences:
            try:
                chunk = sequence.take()
            except Exception:
                logger.exception("a relayed request's tokens could not become text")
                self._cut(sequence, EngineError("the tokens could not become text").info())
                continue
            if chunk is not None:
                frames.setdefault(sequence.link, []).append(pack_chunk(sequence.key, chunk))
            if sequence.processor.is_finished:
                finished.append(sequence)
        for link, chunks in frames.items():
            self.num_sent += len(chunks)
            link.send(pack_frame("chunks", chunks))
        for sequence in finished:
            if not sequence.ended.done():  # else its link was cut just now
                self.remove(sequence)
                sequence.end()
