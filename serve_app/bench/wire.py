"""Just enough HTTP/1.1 and SSE to load a server cheaply: incremental decoders without I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass

_MAX_HEAD_BYTES = 64 * 1024


_STATUS = re.compile(r"[1-5][0-9]{2}")
_DIGITS = re.compile(r"[0-9]{1,18}")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")


class ProtocolError(Exception):
    """The server sent something that is not HTTP/1.1 or not SSE."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Status line and headers; header names in lower case."""

    status: int
    headers: dict[str, str]

    @property
    def is_chunked(self) -> bool:
        """Whether the body comes in chunked transfer coding."""
        return "chunked" in self.headers.get("transfer-encoding", "").lower()


def parse_head(data: bytes) -> tuple[ResponseHead, bytes] | None:
    """Return the head and what follows it, or None while it is incomplete."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        if len(data) > _MAX_HEAD_BYTES:
            raise ProtocolError("the response head is too long")
        return None
    status_line, *lines = data[:end].decode("latin-1").split("\r\n")
    version, _, rest = status_line.partition(" ")
    if not version.startswith("HTTP/1.") or not _STATUS.fullmatch(rest[:3]):
        raise ProtocolError(f"not an HTTP/1.1 response: {status_line[:60]!r}")
    pairs = (line.partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    return ResponseHead(int(rest[:3]), headers), data[end + 4 :]


class BodyDecoder:
    """Takes a body off its transfer coding (RFC 9112: chunked, Content-Length, or to the end)."""

    def __init__(self, head: ResponseHead) -> None:
        self._is_chunked = head.is_chunked
        length = head.headers.get("content-length")
        if length is not None and not _DIGITS.fullmatch(length):
            raise ProtocolError(f"not a Content-Length: {length[:20]!r}")
        self._num_left = int(length) if length is not None and not self._is_chunked else None
        self._buffer = b""
        self.is_complete = self._num_left == 0

    def feed(self, data: bytes) -> bytes:
        """Take bytes off the connection; return those of the body."""
        if self._is_chunked:
            return self._feed_chunked(data)
        if self._num_left is None:
            return data
        body = data[: self._num_left]
        self._num_left -= len(body)
        self.is_complete = self._num_left == 0
        return body

    def _feed_chunked(self, data: bytes) -> bytes:
        buffer = self._buffer + data
        body = []
        while not self.is_complete:
            line_end = buffer.find(b"\r\n")
            if line_end < 0:
                break
            size = _chunk_size(buffer[:line_end])
            end = line_end + 2 + size
            if len(buffer) < end + 2:
                break
            body.append(buffer[line_end + 2 : end])
            buffer = buffer[end + 2 :]
            self.is_complete = size == 0
        self._buffer = buffer
        return b"".join(body)


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    if not _CHUNK_SIZE.fullmatch(digits):
        raise ProtocolError(f"not a chunk size: {line[:20]!r}")
    return int(digits, 16)


class SseDecoder:
    """Cuts a stream into the `data` of its events; comments and other fields are left out.

    Lines end with LF, CRLF or CR (WHATWG HTML, section 9.2.6), however the stream is cut.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._held = b""  # a CR at the end, which an LF may follow

    def feed(self, data: bytes) -> list[bytes]:
        """Take more of the stream; return the data of the events that are complete."""
        data, self._held = self._held + data, b""
        if data.endswith(b"\r"):
            data, self._held = data[:-1], b"\r"
        unified = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *events, self._buffer = (self._buffer + unified).split(b"\n\n")
        found = []
        for event in events:
            lines = [line[5:].lstrip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                found.append(b"\n".join(lines))
        return found
