"""Starts the application for a measurement with `xeray serve`, and ends all of it afterwards."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from serve_app.bench.processes import ProcessGroup
from serve_app.core.errors import ConfigError

MARK_VARIABLE = "XERAY_BENCH_MARK"
_HOST = "127.0.0.1"
_STOP_TIMEOUT_S = 60.0
_POLL_S = 0.2
_LOG_TAIL_LINES = 15


def free_port() -> int:
    """Return a TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


class Service:
    """A running application; a context manager that starts and stops it.

    config: the Serve config file to start. overrides: `section.key=value` for the application's
    `args`. host: where it listens, instead of the config's; the port is a free one. Raises
    ConfigError with the log's end where it does not become ready within `timeout_s`.
    """

    def __init__(
        self,
        config: Path,
        overrides: Sequence[str] = (),
        *,
        host: str | None = None,
        timeout_s: float = 300.0,
    ) -> None:
        self.port = free_port()
        self._arguments = [str(config), "--port", str(self.port)]
        if host is not None:
            self._arguments += ["--host", host]
        for override in overrides:
            self._arguments += ["--set", override]
        self._timeout_s = timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="xeray-bench-")
        self._mark = f"{MARK_VARIABLE}={secrets.token_hex(8)}"
        self._process: subprocess.Popen[bytes] | None = None
        self.startup_s = 0.0

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{_HOST}:{self.port}"

    @property
    def processes(self) -> ProcessGroup:
        """All its processes."""
        return ProcessGroup(self._mark)

    def __enter__(self) -> Self:
        begin_s = time.monotonic()
        try:
            self._start()
            self._wait_until_ready(begin_s + self._timeout_s)
        except BaseException:
            self._stop()
            raise
        self.startup_s = time.monotonic() - begin_s
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    @property
    def _log(self) -> Path:
        return Path(self._folder.name) / "service.log"

    def _start(self) -> None:
        name, _, value = self._mark.partition("=")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serve_app.cli.main", "serve", *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, name: value},
                start_new_session=True,  # Ctrl-C is ours to pass on, after the figures are in
            )

    def _wait_until_ready(self, deadline_s: float) -> None:
        assert self._process is not None, "started before"
        while not _is_ready(f"{self.url}/readyz"):
            if self._process.poll() is not None:
                raise ConfigError(f"the service did not start: {self._log_tail()}")
            if time.monotonic() > deadline_s:
                raise ConfigError(
                    f"the service was not ready after {self._timeout_s:.0f} s: {self._log_tail()}"
                )
            time.sleep(_POLL_S)

    def _log_tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return " | ".join(line.strip() for line in lines[-_LOG_TAIL_LINES:] if line.strip())

    def _stop(self) -> None:
        """Interrupt the command, as Ctrl-C does; end by id whatever of it is left."""
        process = self._process
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_TIMEOUT_S)
            for pid in self.processes.snapshot():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        self._folder.cleanup()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5.0) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
