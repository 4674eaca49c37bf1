"""One engine process as its parent sees it: spawned, framed, killed. No torch."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from serve_app.engine.wire import FrameReader, pack_frame

_END_TIMEOUT_S = 5.0


class _FrameProtocol(asyncio.Protocol):
    """Hands each chunk's complete frames on in one go: one wake-up of the loop per chunk."""

    def __init__(
        self, on_frames: Callable[[list[list[Any]]], None], on_lost: Callable[[], None]
    ) -> None:
        self._reader = FrameReader()
        self._on_frames = on_frames
        self._on_lost = on_lost

    def data_received(self, data: bytes) -> None:
        """Feed the reader."""
        frames = list(self._reader.feed(data))
        if frames:
            self._on_frames(frames)

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end of the socket, whichever way it came."""
        self._on_lost()


class EngineProcess:
    """A child running `serve_app.engine.worker`, and the socket to it.

    `on_frames` and `on_lost` are called on the event loop; `on_lost` once, when the socket ends.
    """

    def __init__(self, popen: subprocess.Popen[bytes], transport: asyncio.Transport) -> None:
        self._popen = popen
        self._transport = transport

    @classmethod
    async def spawn(
        cls,
        env: Mapping[str, str],
        pass_fds: tuple[int, ...],
        on_frames: Callable[[list[list[Any]]], None],
        on_lost: Callable[[], None],
    ) -> EngineProcess:
        """Start the child from this thread: the kernel ties its life to the thread that made it.

        `env` is laid over this process's environment. `pass_fds` stay open in the child.
        """
        ours, theirs = socket.socketpair()
        try:
            popen = subprocess.Popen(
                [sys.executable, "-m", "serve_app.engine.worker", str(theirs.fileno())],
                env={**os.environ, **env},
                pass_fds=(theirs.fileno(), *pass_fds),
                stdin=subprocess.DEVNULL,
            )
        finally:
            theirs.close()
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_unix_connection(
            lambda: _FrameProtocol(on_frames, on_lost), sock=ours
        )
        return cls(popen, transport)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._popen.pid

    def send(self, *parts: Any) -> None:
        """Queue a frame; never blocks."""
        if not self._transport.is_closing():
            self._transport.write(pack_frame(*parts))

    def kill(self) -> None:
        """Kill the child, whatever it is doing."""
        if self._popen.poll() is None:
            self._popen.kill()

    async def end(self, timeout_s: float = _END_TIMEOUT_S) -> int:
        """Wait for the child to exit, kill it when it takes longer; returns its exit code."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._popen.poll() is None:
            if asyncio.get_running_loop().time() > deadline:
                self._popen.kill()
            await asyncio.sleep(0.01)
        self._transport.close()
        return self._popen.returncode
