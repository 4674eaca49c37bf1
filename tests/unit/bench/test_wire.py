from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.bench.wire import BodyDecoder, ProtocolError, ResponseHead, SseDecoder, parse_head

bodies = st.lists(st.binary(min_size=1, max_size=20), max_size=6)
cuts = st.lists(st.integers(0, 200), max_size=10)


def split(data: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in at), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def head(**headers: str) -> ResponseHead:
    return ResponseHead(200, {name.replace("_", "-"): value for name, value in headers.items()})


@given(pieces=bodies, at=cuts)
def test_chunked_body_does_not_depend_on_the_split(pieces: list[bytes], at: list[int]) -> None:
    wire = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"
    decoder = BodyDecoder(head(transfer_encoding="chunked"))

    body = b"".join(decoder.feed(part) for part in split(wire, at))

    assert body == b"".join(pieces)
    assert decoder.is_complete


@given(body=st.binary(max_size=50), at=cuts)
def test_length_body_ends_at_its_length(body: bytes, at: list[int]) -> None:
    decoder = BodyDecoder(head(content_length=str(len(body))))

    assert b"".join(decoder.feed(part) for part in split(body + b"next", at)) == body
    assert decoder.is_complete


def test_body_without_length_goes_to_the_end() -> None:
    decoder = BodyDecoder(head())

    assert decoder.feed(b"abc") == b"abc"
    assert not decoder.is_complete


@given(at=cuts)
def test_events_do_not_depend_on_the_split(at: list[int]) -> None:
    stream = b": hello\n\ndata: one\n\nevent: x\ndata: two\ndata: lines\n\ndata:[DONE]\n\ndata: cut"
    decoder = SseDecoder()

    events = [event for part in split(stream, at) for event in decoder.feed(part)]

    assert events == [b"one", b"two\nlines", b"[DONE]"]


def test_head_is_parsed_once_complete() -> None:
    data = b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\nX-A: b: c\r\n\r\nabc"

    assert parse_head(data[:20]) is None
    parsed = parse_head(data)

    assert parsed == (ResponseHead(404, {"content-length": "3", "x-a": "b: c"}), b"abc")


@pytest.mark.parametrize("data", [b"SSH-2.0\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"x" * 70_000])
def test_what_is_not_http_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_head(data)


def test_bad_chunk_size_is_refused() -> None:
    with pytest.raises(ProtocolError, match="chunk size"):
        BodyDecoder(head(transfer_encoding="chunked")).feed(b"zz\r\n")
