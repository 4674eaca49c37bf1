"""Server-sent events: framing, and JSON text that no line splitter can break."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from json.encoder import encode_basestring

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)

# Legal inside JSON strings, but clients that cut their input with a Unicode-aware splitlines()
# would end the event there.
_LINE_BREAKS = re.compile("[\x85\u2028\u2029]")
_quote: Callable[[str], str] = encode_basestring


def json_string(text: str) -> bytes:
    """Return `text` as a JSON string in UTF-8; lone surrogates become `?`."""
    quoted = _quote(text)
    if quoted.isascii():
        return quoted.encode("ascii")
    return _escape_breaks(quoted).encode("utf-8", "replace")


def json_bytes(value: object) -> bytes:
    """Return `value` as compact JSON in UTF-8, on one line for every line splitter."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return _escape_breaks(text).encode("utf-8", "replace")


def event(value: object) -> bytes:
    """Return one event that carries `value` as JSON."""
    return b"data: " + json_bytes(value) + b"\n\n"


def _escape_breaks(text: str) -> str:
    return _LINE_BREAKS.sub(lambda match: f"\\u{ord(match.group()):04x}", text)
