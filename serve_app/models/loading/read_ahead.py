"""Reads files ahead of whoever uses their mappings, so that no page fault waits for the disk."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_PIECE_BYTES = 8 << 20
_NUM_THREADS = 4
AHEAD_BYTES = 2 << 30
"""How far reading runs ahead: more could push pages out again before they are used."""


_WORTH_BYTES = 256 << 20
"""Less than this is there before threads have started."""

Progress = Callable[[int, int], None]
"""Told bytes read and bytes in all."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [start, start + nbytes) of a file."""

    path: Path
    start: int
    nbytes: int


class ReadAhead:
    """Brings spans into the page cache in their order, on threads, at most `ahead_bytes` ahead.

    Whoever uses the spans says so with `advance`. The bytes go through one buffer per thread and
    are dropped: what counts is that the kernel has them. A file that cannot be read is left to its
    user, who meets the same error.
    """

    def __init__(self, spans: Iterable[Span], ahead_bytes: int = AHEAD_BYTES) -> None:
        self._pieces = _pieces(spans)
        self._condition = threading.Condition()
        self._allowed_bytes = ahead_bytes
        self._taken_bytes = 0
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._run, name="read-ahead", daemon=True)
            for _ in range(_NUM_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def taken_bytes(self) -> int:
        """Bytes that were read or are being read."""
        return self._taken_bytes

    def advance(self, num_bytes: int) -> None:
        """Tell that `num_bytes` more were used: as much more may be read."""
        with self._condition:
            self._allowed_bytes += num_bytes
            self._condition.notify_all()

    def close(self) -> None:
        """Stop reading, and wait for the threads to end."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        buffer = bytearray(_PIECE_BYTES)
        while (piece := self._next()) is not None:
            _read(piece, buffer)

    def _next(self) -> Span | None:
        with self._condition:
            self._condition.wait_for(
                lambda: self._is_closed or self._taken_bytes < self._allowed_bytes
            )
            piece = None if self._is_closed else next(self._pieces, None)
            if piece is not None:
                self._taken_bytes += piece.nbytes
            return piece


@contextlib.contextmanager
def reading_ahead(spans: Sequence[Span], progress: Progress | None) -> Iterator[Progress]:
    """Read `spans` ahead of a loader that tells the progress which this yields."""
    tell = progress or (lambda read_bytes, total_bytes: None)
    if sum(span.nbytes for span in spans) < _WORTH_BYTES:
        yield tell
        return
    ahead = ReadAhead(spans)
    used_bytes = 0

    def told(read_bytes: int, total_bytes: int) -> None:
        nonlocal used_bytes
        ahead.advance(read_bytes - used_bytes)
        used_bytes = read_bytes
        tell(read_bytes, total_bytes)

    try:
        yield told
    finally:
        ahead.close()


def _pieces(spans: Iterable[Span]) -> Iterator[Span]:
    for span in spans:
        for offset in range(0, span.nbytes, _PIECE_BYTES):
            nbytes = min(_PIECE_BYTES, span.nbytes - offset)
            yield Span(span.path, span.start + offset, nbytes)


def _read(piece: Span, buffer: bytearray) -> None:
    view = memoryview(buffer)
    try:
        descriptor = os.open(piece.path, os.O_RDONLY)
    except OSError:
        return
    try:
        done = 0
        while done < piece.nbytes:
            count = os.preadv(descriptor, [view[: piece.nbytes - done]], piece.start + done)
            if count == 0:
                return
            done += count
    except OSError:
        return
    finally:
        os.close(descriptor)
